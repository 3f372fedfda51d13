// The conversation: sends messages, shows answers as they come, and asks one question in several languages side by side.

import { chat, model, ServerError } from "./api.js";
import { Pictures, thumbnail } from "./pictures.js";
import { redrawRoutes, routingBox } from "./routing.js";
import { languageName, preferredLanguage, questionIn, setLanguage, TEXTS, write, writeForeign } from "./texts.js";

const find = (id) => document.getElementById(id);
const conversation = find("conversation");
const pictures = new Pictures(find("pictures"), { room, onError: showError });
let messages = [];
let served = null;
let running = null;
let languages = Object.keys(TEXTS);
let languageChosen = false;

function showError(key, values) {
  write(find("error"), key, values);
  find("error").hidden = false;
}

function hideError() {
  writeForeign(find("error"));
  find("error").hidden = true;
}

/** Writes why something failed: a text of the page, or what the server says, in English. */
function writeReason(element, error) {
  if (!(error instanceof ServerError)) write(element, "unreachable", { reason: error.message });
  else if (error.status === 401) write(element, "refused");
  else writeForeign(element, error.message, "en");
}

function showReason(error) {
  writeReason(find("error"), error);
  find("error").hidden = false;
}

/** Asks the server for its model, unless it has told, and fits the page to it. */
async function findModel() {
  if (served) return served;
  served = await model(find("key").value);
  find("model").textContent = document.title = served.id;
  write(find("experts"), served.parrot.num_experts ? "introExperts" : "noRouting");
  offer(served.parrot.languages);
  return served;
}

/** Offers languages; the page changes to the one that fits best, unless the user has chosen one of them. */
function offer(codes) {
  languages = codes;
  const select = find("language");
  const kept = languageChosen && codes.includes(select.value) ? select.value : preferredLanguage(codes);
  select.replaceChildren(...codes.map((code) => {
    const option = new Option(languageName(code), code);
    option.lang = code;
    return option;
  }));
  select.value = kept;
  speak(kept);
}

/** Changes the language of the page, and of what is there already. */
function speak(code) {
  setLanguage(code);
  redrawRoutes(conversation);
}

/** How many pictures a conversation may have, and how many of them are left for the next message. */
function room() {
  const most = served?.parrot.max_images ?? Infinity;
  return { most, left: most - sentPictures().length };
}

function userContent(question, urls) {
  return [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: question }];
}

function article(kind) {
  const element = document.createElement("article");
  element.className = kind;
  element.append(document.createElement("h2"));
  return element;
}

/** A paragraph of a text in some language, which may not be known. */
function paragraph(content, className = "", language = "") {
  const element = document.createElement("p");
  element.className = className;
  element.dir = "auto";
  writeForeign(element, content, language);
  return element;
}

/** A paragraph of a text of the page. */
function note(key) {
  const element = document.createElement("p");
  element.className = "note";
  write(element, key);
  return element;
}

function showQuestion(question, urls) {
  const element = article("user");
  write(element.firstChild, "you");
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
async function answerInto(element, asked, signal, language = "") {
  const output = paragraph("", "answer", language);
  element.append(output);
  element.setAttribute("aria-busy", "true");
  try {
    const { id, parrot } = await findModel();
    const request = {
      model: id, messages: asked, parrot_routing: parrot.num_experts > 0,
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
    if (!signal.aborted) throw error;
    element.append(note("stopped"));
  } finally {
    element.setAttribute("aria-busy", "false");
  }
  return output.textContent;
}

/**
 * Runs one exchange with the stop button shown; what still runs at its end is stopped. Errors appear above the message.
 *
 * @param {function(AbortSignal): Promise<string>} work gives back the key of what the status says then.
 * @returns {Promise<boolean>} whether it succeeded.
 */
async function exchange(work) {
  hideError();
  const own = new AbortController();
  running = own;
  find("stop").hidden = false;
  for (const id of ["send", "compare", "reset"]) find(id).disabled = true;
  write(find("status"), "thinking");
  try {
    const outcome = await work(own.signal);
    write(find("status"), own.signal.aborted ? "stopped" : outcome);
    return true;
  } catch (error) {
    writeForeign(find("status"));
    showReason(error);
    return false;
  } finally {
    own.abort();
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
  const element = article("model");
  write(element.firstChild, "model");
  conversation.append(element);
  const asked = [...messages, { role: "user", content: userContent(question, urls) }];
  const answered = await exchange(async (signal) => {
    const answer = await answerInto(element, asked, signal);
    messages = [...asked, { role: "assistant", content: answer }];
    return "finished";
  });
  if (answered) return element.scrollIntoView({ block: "nearest" });
  // A message that was refused goes back to where it can be changed and sent again.
  shown.remove();
  element.remove();
  find("message").value ||= question;
  pictures.restore(attached);
}

/** Addresses of the pictures of the conversation. */
function sentPictures() {
  const parts = messages.flatMap((message) => (Array.isArray(message.content) ? message.content : []));
  return parts.filter((part) => part.type === "image_url").map((part) => part.image_url.url);
}

/** Pictures that a comparison is about: those of the next message, else those of the conversation. */
function comparedPictures() {
  return pictures.entries.length ? pictures.entries.map((entry) => entry.url) : sentPictures();
}

function openComparison() {
  if (!comparedPictures().length) return showError("needsPicture");
  hideError();
  find("questions").replaceChildren(...languages.map((code) => {
    const label = document.createElement("label");
    const name = document.createElement("span");
    writeForeign(name, languageName(code), code);
    const input = document.createElement("input");
    Object.assign(input, { name: code, lang: code, dir: "auto", value: questionIn(code) });
    label.append(name, input);
    return label;
  }));
  find("languages").showModal();
}

/** Asks one question of a comparison in a column of its own, which also shows why it failed; tells whether it did not. */
async function askBeside(side, urls, code, question, signal) {
  const element = article("model");
  writeForeign(element.firstChild, languageName(code), code);
  element.append(paragraph(question, "note", code));
  side.append(element);
  try {
    await answerInto(element, [{ role: "user", content: userContent(question, urls) }], signal, code);
    return true;
  } catch (error) {
    const failure = paragraph("", "wrong");
    writeReason(failure, error);
    element.append(failure);
    return false;
  }
}

async function compare(questions) {
  const urls = comparedPictures();
  find("intro").hidden = true;
  const shown = showQuestion("", urls);
  const side = document.createElement("div");
  side.className = "side";
  conversation.append(side);
  const asked = await exchange(async (signal) => {
    await findModel();
    const answered = await Promise.all(questions.map((own) => askBeside(side, urls, ...own, signal)));
    return answered.every(Boolean) ? "finished" : "partly";
  });
  if (asked) return side.scrollIntoView({ block: "nearest" });
  shown.remove();
  side.remove();
}

const hasFiles = (event) => event.dataTransfer.types.includes("Files");

function listenForFiles() {
  find("files").onchange = async (event) => { await pictures.add(event.target.files); event.target.value = ""; };
  find("attach").onclick = () => find("files").click();
  document.addEventListener("paste", (event) => pictures.add(event.clipboardData.files));
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    find("composer").classList.add("over");
  });
  document.addEventListener("dragleave", () => find("composer").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;  // text goes where it is dropped
    event.preventDefault();
    find("composer").classList.remove("over");
    pictures.add(event.dataTransfer.files);
  });
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
  find("compare").onclick = openComparison;
  find("cancel").onclick = () => find("languages").close();
  find("languages").querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    find("languages").close();
    const asked = [...find("questions").querySelectorAll("input")].map((input) => [input.name, input.value.trim()]);
    compare(asked.filter(([, question]) => question));
  };
  find("key").onchange = () => findModel().then(hideError, showReason);
  find("scheme").onchange = (event) => { document.documentElement.style.colorScheme = event.target.value; };
  find("language").onchange = (event) => {
    languageChosen = true;
    speak(event.target.value);
  };
}

offer(languages);
listen();
listenForFiles();
findModel().catch(showReason);
