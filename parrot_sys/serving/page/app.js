// The conversation: sends messages, shows answers as they come, and asks one question in several languages side by side.

import { chat, model, ServerError } from "./api.js";
import { Pictures, thumbnail } from "./pictures.js";
import { routingBox } from "./routing.js";
import { preferredLanguage, setLanguage, text, TEXTS } from "./texts.js";

const find = (id) => document.getElementById(id);
const conversation = find("conversation");
const pictures = new Pictures(find("pictures"), { onError: showError });
let messages = [];
let served = null;
let running = null;

function showError(message) {
  find("error").textContent = message;
  find("error").hidden = !message;
}

function reason(error) {
  if (error instanceof ServerError) return error.status === 401 ? text("refused") : error.message;
  return text("unreachable", { reason: error.message });
}

async function findModel() {
  served ??= await model(find("key").value);
  find("model").textContent = served.id;
  document.title = served.id;
  return served.id;
}

function userContent(question, urls) {
  return [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: question }];
}

function article(kind, heading) {
  const element = document.createElement("article");
  element.className = kind;
  const title = document.createElement("h2");
  title.textContent = heading;
  element.append(title);
  return element;
}

function paragraph(content, className = "") {
  const element = document.createElement("p");
  element.className = className;
  element.dir = "auto";
  element.textContent = content;
  return element;
}

function showQuestion(question, urls) {
  const element = article("user", text("you"));
  if (urls.length) {
    const list = document.createElement("ul");
    list.className = "pictures";
    urls.forEach((url, index) => {
      const item = document.createElement("li");
      item.append(thumbnail(url, index));
      list.append(item);
    });
    element.append(list);
  }
  if (question) element.append(paragraph(question));
  conversation.append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

/** Asks, and writes the answer into `element` as it comes; gives back the whole answer. */
async function answerInto(element, asked, signal) {
  const output = paragraph("", "answer");
  element.append(output);
  element.setAttribute("aria-busy", "true");
  try {
    const request = {
      model: await findModel(), messages: asked,
      temperature: Number(find("temperature").value), max_tokens: Number(find("length").value),
    };
    await chat(request, {
      key: find("key").value, signal,
      onText: (piece) => { output.textContent += piece; },
      onRouting: (routing) => {
        const box = routingBox(routing);
        if (box) element.append(box);
      },
    });
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    element.append(paragraph(text("stopped"), "note"));
  } finally {
    element.setAttribute("aria-busy", "false");
  }
  return output.textContent;
}

/** Runs one exchange with the stop button shown; errors appear above the message. Gives back whether it succeeded. */
async function exchange(work) {
  showError("");
  running = new AbortController();
  find("stop").hidden = false;
  for (const id of ["send", "compare", "reset"]) find(id).disabled = true;
  find("status").textContent = text("thinking");
  try {
    await work(running.signal);
    find("status").textContent = text("finished");
    return true;
  } catch (error) {
    find("status").textContent = "";
    showError(reason(error));
    return false;
  } finally {
    running = null;
    find("stop").hidden = true;
    for (const id of ["send", "compare", "reset"]) find(id).disabled = false;
    find("message").focus();
  }
}

async function send() {
  const question = find("message").value.trim();
  if (running || !(question || pictures.entries.length)) return;
  const attached = pictures.take();
  const urls = attached.map((entry) => entry.url);
  find("message").value = "";
  find("intro").hidden = true;
  const shown = showQuestion(question, urls);
  const element = article("model", text("model"));
  conversation.append(element);
  const asked = [...messages, { role: "user", content: userContent(question, urls) }];
  const answered = await exchange(async (signal) => {
    const answer = await answerInto(element, asked, signal);
    messages = [...asked, { role: "assistant", content: answer }];
  });
  if (answered) return element.scrollIntoView({ block: "nearest" });
  // A message that was refused goes back to where it can be changed and sent again.
  shown.remove();
  element.remove();
  find("message").value ||= question;
  pictures.restore(attached);
}

/** Pictures that a comparison is about: those of the next message, else those of the conversation. */
function comparedPictures() {
  if (pictures.entries.length) return pictures.entries.map((entry) => entry.url);
  const parts = messages.flatMap((message) => (Array.isArray(message.content) ? message.content : []));
  return parts.filter((part) => part.type === "image_url").map((part) => part.image_url.url);
}

function openComparison() {
  if (!comparedPictures().length) return showError(text("needsPicture"));
  showError("");
  find("questions").replaceChildren(...Object.entries(TEXTS).map(([code, texts]) => {
    const label = document.createElement("label");
    const name = document.createElement("span");
    name.textContent = texts.name;
    name.lang = code;
    const input = document.createElement("input");
    Object.assign(input, { name: code, lang: code, dir: "auto", value: texts.question });
    label.append(name, input);
    return label;
  }));
  find("languages").showModal();
}

async function compare(questions) {
  const urls = comparedPictures();
  find("intro").hidden = true;
  const shown = showQuestion("", urls);
  const side = document.createElement("div");
  side.className = "side";
  conversation.append(side);
  const answered = await exchange((signal) => Promise.all(questions.map(async ([code, question]) => {
    const element = article("model", TEXTS[code].name);
    element.lang = code;
    element.append(paragraph(question, "note"));
    side.append(element);
    await answerInto(element, [{ role: "user", content: userContent(question, urls) }], signal);
  })));
  if (answered) return side.scrollIntoView({ block: "nearest" });
  shown.remove();
  side.remove();
}

function listen() {
  find("composer").onsubmit = (event) => { event.preventDefault(); send(); };
  find("message").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  find("stop").onclick = () => running?.abort();
  find("reset").onclick = () => {
    messages = [];
    conversation.replaceChildren();
    find("intro").hidden = false;
    find("message").focus();
  };
  find("files").onchange = async (event) => { await pictures.add(event.target.files); event.target.value = ""; };
  find("attach").onclick = () => find("files").click();
  document.addEventListener("paste", (event) => pictures.add(event.clipboardData.files));
  document.addEventListener("dragover", (event) => { event.preventDefault(); find("composer").classList.add("over"); });
  document.addEventListener("dragleave", () => find("composer").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    find("composer").classList.remove("over");
    pictures.add(event.dataTransfer.files);
  });
  find("compare").onclick = openComparison;
  find("cancel").onclick = () => find("languages").close();
  find("languages").querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    find("languages").close();
    const asked = [...find("questions").querySelectorAll("input")].map((input) => [input.name, input.value.trim()]);
    compare(asked.filter(([, question]) => question));
  };
  find("key").onchange = () => findModel().then(() => showError(""), (error) => showError(reason(error)));
  find("scheme").onchange = (event) => { document.documentElement.style.colorScheme = event.target.value; };
  find("language").onchange = (event) => { setLanguage(event.target.value); pictures.draw(); };
}

find("language").append(...Object.entries(TEXTS).map(([code, texts]) => new Option(texts.name, code)));
find("language").value = preferredLanguage();
setLanguage(find("language").value);
listen();
findModel().catch((error) => showError(reason(error)));
