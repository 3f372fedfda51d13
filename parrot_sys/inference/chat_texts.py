"""Texts of `parrot chat` itself, in the languages that somebody wrote them in."""
# ruff: noqa: RUF001 - letters of Turkish, Russian and Chinese look like others

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parrot_sys.data.languages import language_code, lookup
from parrot_sys.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTexts:
    """Texts in one language."""

    welcome: str
    help: str
    attached: str
    """With `{file}`."""
    forgotten: str
    stopped: str
    how_to_quit: str
    no_experts: str
    error: str
    question: str
    """An example question about a picture."""


def _texts(intro: str, question: str, image: str, reset: str, leave: str, show_help: str, **rest: str) -> ChatTexts:
    commands = f"  /image FILE  {image}\n  /reset       {reset}\n  /help        {show_help}\n  /quit        {leave}"
    return ChatTexts(welcome=f"{intro}\n{commands}", help=commands, question=question, **rest)


TEXTS: Mapping[str, ChatTexts] = {
    "en": _texts(
        intro="Write a message, or attach a picture first and ask: What is in the picture?",
        question="What is in the picture?",
        image="attach a picture to the next message",
        reset="forget the conversation",
        leave="leave (also Ctrl-D)",
        show_help="show this",
        attached="{file} goes with the next message.",
        forgotten="The conversation is forgotten.",
        stopped="Stopped; this message is forgotten.",
        how_to_quit="/quit leaves.",
        no_experts="No picture, or a model without experts: no expert weights.",
        error="error",
    ),
    "zh": _texts(
        intro="请输入消息，或先附上图片再提问：图中是什么？",
        question="图中是什么？",
        image="为下一条消息附上图片",
        reset="清空对话",
        leave="退出（或 Ctrl-D）",
        show_help="显示本帮助",
        attached="{file} 将随下一条消息发送。",
        forgotten="对话已清空。",
        stopped="已停止；这条消息不计入对话。",
        how_to_quit="输入 /quit 退出。",
        no_experts="没有图片或模型没有专家：无专家权重。",
        error="错误",
    ),
    "pt": _texts(
        intro="Escreva uma mensagem, ou anexe antes uma imagem e pergunte: O que há na imagem?",
        question="O que há na imagem?",
        image="anexa uma imagem à próxima mensagem",
        reset="esquece a conversa",
        leave="sai (também Ctrl-D)",
        show_help="mostra esta ajuda",
        attached="{file} segue com a próxima mensagem.",
        forgotten="A conversa foi esquecida.",
        stopped="Interrompido; esta mensagem foi esquecida.",
        how_to_quit="/quit sai.",
        no_experts="Sem imagem, ou modelo sem especialistas: não há pesos.",
        error="erro",
    ),
    "ar": _texts(
        intro="اكتب رسالة، أو أرفق صورة أولاً ثم اسأل: ماذا يوجد في الصورة؟",
        question="ماذا يوجد في الصورة؟",
        image="إرفاق صورة بالرسالة التالية",
        reset="نسيان المحادثة",
        leave="خروج (أو Ctrl-D)",
        show_help="عرض هذه المساعدة",
        attached="سيُرسل {file} مع الرسالة التالية.",
        forgotten="نُسيت المحادثة.",
        stopped="توقف؛ نُسيت هذه الرسالة.",
        how_to_quit="اكتب ‎/quit للخروج.",
        no_experts="لا توجد صورة أو أن النموذج بلا خبراء: لا أوزان للخبراء.",
        error="خطأ",
    ),
    "tr": _texts(
        intro="Bir mesaj yazın ya da önce bir resim ekleyip sorun: Resimde ne var?",
        question="Resimde ne var?",
        image="sonraki mesaja resim ekler",
        reset="konuşmayı unutur",
        leave="çıkar (Ctrl-D de olur)",
        show_help="bu yardımı gösterir",
        attached="{file} sonraki mesajla gönderilecek.",
        forgotten="Konuşma unutuldu.",
        stopped="Durduruldu; bu mesaj unutuldu.",
        how_to_quit="/quit ile çıkılır.",
        no_experts="Resim yok ya da modelde uzman yok: uzman ağırlığı yok.",
        error="hata",
    ),
    "ru": _texts(
        intro="Напишите сообщение или сначала приложите картинку и спросите: Что изображено на картинке?",
        question="Что изображено на картинке?",
        image="приложить картинку к следующему сообщению",
        reset="забыть разговор",
        leave="выйти (или Ctrl-D)",
        show_help="показать эту справку",
        attached="{file} уйдёт со следующим сообщением.",
        forgotten="Разговор забыт.",
        stopped="Остановлено; это сообщение забыто.",
        how_to_quit="/quit - выход.",
        no_experts="Нет картинки или модель без экспертов: весов нет.",
        error="ошибка",
    ),
}


def texts_in(language: str) -> ChatTexts:
    """Texts in a language, or in that of a code with fewer subtags (`pt` for `pt-BR`).

    Raises:
        ConfigError: there are none, or it is no code.
    """
    texts = lookup(language_code(language), TEXTS)
    if texts is None:
        raise ConfigError(
            f"language must be one that the help is written in ({', '.join(TEXTS)}), got {language!r}; the model "
            "itself answers in the language it is asked in"
        )
    return texts
