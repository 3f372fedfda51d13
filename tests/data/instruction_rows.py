"""Rows of public instruction sets, as they were published."""

from __future__ import annotations

LLAVA = [
    {
        "id": "000000033471",
        "image": "000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back of the bus?"},
            {"from": "gpt", "value": "The back of the bus features an advertisement."},
        ],
    },
    {
        "id": "000000052846",
        "image": "coco/train2017/000000052846.jpg",
        "conversations": [
            {"from": "human", "value": "Where is the cat?\n<image>"},
            {"from": "gpt", "value": "In the snow."},
        ],
    },
]
AOKVQA = [
    {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "his ride"],
        "difficult_direct_answer": False,
        "rationales": [
            "A train would not be on the street, he would not have luggage waiting for a delivery.",
            "He has bags as if he is going someone.",
            "He is waiting for a cab.",
        ],
    }
]
MINIGPT4 = {"annotations": [{"image_id": "2", "caption": "The image shows a man fishing on a lawn next to a river."}]}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "sentids": [770337, 771687],
            "filename": "COCO_val2014_000000391895.jpg",
            "imgid": 0,
            "split": "restval",
            "sentences": [
                {"tokens": ["a", "man"], "raw": "A man with a red helmet. ", "imgid": 0, "sentid": 770337},
                {"tokens": ["a", "bike"], "raw": "A man rides a dirt bike.", "imgid": 0, "sentid": 771687},
            ],
            "cocoid": 391895,
        },
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000042.jpg",
            "imgid": 1,
            "split": "test",
            "sentences": [{"tokens": [], "raw": "Shoes.", "imgid": 1, "sentid": 1}],
            "sentids": [1],
            "cocoid": 42,
        },
    ],
}
LAVIS = [
    {
        "caption": "A woman wearing a net on her head cutting a cake. ",
        "image": "val2014/COCO_val2014_000000522418.jpg",
        "image_id": "coco_522418",
    }
]
OCR_VQA = {
    "761183272": {
        "imageURL": "http://ecx.images-amazon.com/images/I/61Y5cOdHJbL.jpg",
        "questions": ["Who wrote this book?", "What is the title of this book?"],
        "answers": ["Sandra Boynton", "Mom's Family Wall Calendar 2016"],
        "title": "Mom's Family Wall Calendar 2016",
        "authorName": "Sandra Boynton",
        "genre": "Calendars",
        "split": 1,
    },
    "1449476953": {"imageURL": "http://x/y.jpg", "questions": ["Q"], "answers": ["A"], "split": 3},
}
VQA_V2 = {
    "info": {},
    "annotations": [
        {
            "question_type": "what is this",
            "multiple_choice_answer": "net",
            "answers": [{"answer": "net", "answer_confidence": "maybe", "answer_id": 1}],
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752000,
        }
    ],
}
VQA_V2_QUESTIONS = {
    "questions": [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000}
    ]
}
DOLLY = [
    {
        "instruction": "When did Virgin Australia start operating?",
        "context": "Virgin Australia commenced services on 31 August 2000.",
        "response": "On 31 August 2000.",
        "category": "closed_qa",
    },
    {"instruction": "Which is a species of fish? Tope or Rope", "context": "", "response": "Tope", "category": "x"},
]
ALPACA = [
    {"instruction": "Give three tips.", "input": "", "output": "1. Eat well.\n2. Sleep.\n3. Walk."},
    {"instruction": "Evaluate this sentence.", "input": "He finnished his meal", "output": "It is misspelt."},
]
BAIZE = [
    {
        "topic": "Which is the best way?",
        "input": "The conversation between human and AI assistant.\n[|Human|] Which is the best way?\n[|AI|] By train."
        "\n[|Human|] Why?\n[|AI|] It is quick.\n[|Human|] ",
    }
]
