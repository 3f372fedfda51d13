// Routes of an answer: the weight of each expert for each picture, and the words that the router attended to.

import { text } from "./texts.js";

const drawn = new WeakMap();

function make(tag, className, content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (content !== undefined) element.textContent = content;
  return element;
}

function percent(share) {
  return new Intl.NumberFormat(document.documentElement.lang, { style: "percent", maximumFractionDigits: 1 }).format(share);
}

function bars(experts) {
  const list = make("dl", "bars");
  experts.forEach((weight, index) => {
    const track = make("dd", "track");
    track.setAttribute("aria-hidden", "true");
    track.style.setProperty("--share", weight);
    track.style.setProperty("--equal", 1 / experts.length);
    track.append(make("div", "bar"), make("div", "equal"));
    list.append(make("dt", "", text("expert", { number: index + 1 })), track, make("dd", "", percent(weight)));
  });
  return list;
}

function words(attention) {
  const box = make("div");
  box.append(make("p", "note", text("words")));
  const line = make("p", "words");
  line.dir = "auto";
  line.lang = "";
  const most = Math.max(...attention.map((word) => word.weight), Number.MIN_VALUE);
  for (const word of attention) {
    const span = make("span", "", word.text);
    span.style.setProperty("--share", word.weight / most);
    span.title = percent(word.weight);
    line.append(span);
  }
  const read = make("p", "hidden");
  const strongest = [...attention].sort((a, b) => b.weight - a.weight).slice(0, 5);
  read.textContent = strongest.map((word) => `${word.text.trim()} ${percent(word.weight)}`).join(", ");
  box.append(line, read);
  return box;
}

/** A box with a bar chart and the words for each picture; null where the model has no routes. */
export function routingBox(routing) {
  const routed = routing.images.filter((image) => image.experts);
  if (!routed.length) return null;
  const box = make("div", "routing");
  for (const image of routed) {
    const figure = make("figure");
    figure.append(make("figcaption", "", text("experts", { number: image.index + 1 })), bars(image.experts));
    figure.append(make("p", "note", text("equal")));
    if (image.attention?.length) figure.append(words(image.attention));
    box.append(figure);
  }
  drawn.set(box, routing);
  return box;
}

/** Draws all boxes below an element anew, in the language that the page has now. */
export function redrawRoutes(element) {
  for (const box of element.querySelectorAll(".routing")) box.replaceWith(routingBox(drawn.get(box)));
}
