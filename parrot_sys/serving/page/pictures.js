// Pictures of the next message: chosen, dropped or pasted; each is kept as a data URL.

import { write } from "./texts.js";

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function isPicture(url) {
  const image = new Image();
  image.src = url;
  return image.decode().then(() => true, () => false);
}

/** The list of pictures beside the message; `room` says how many it may have, `onError` takes a text's key and values. */
export class Pictures {
  constructor(list, { room, onError }) {
    this.list = list;
    this.room = room;
    this.onError = onError;
    this.entries = [];
  }

  async add(files) {
    for (const file of files) {
      const url = await read(file);
      if (!await isPicture(url)) this.onError("notPicture", { file: file.name });
      else if (this.entries.length >= this.room().left) this.onError("tooMany", { count: this.room().most });
      else this.entries.push({ name: file.name, url });
    }
    this.draw();
  }

  /** Takes the pictures out for a message. */
  take() {
    const taken = this.entries;
    this.entries = [];
    this.draw();
    return taken;
  }

  /** Puts pictures back that were taken. */
  restore(taken) {
    this.entries = [...taken, ...this.entries];
    this.draw();
  }

  draw() {
    this.list.replaceChildren(...this.entries.map((entry, index) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "×";
      write(button, "remove", { file: entry.name }, "label");
      button.onclick = () => {
        this.entries.splice(index, 1);
        this.draw();
      };
      item.append(thumbnail(entry.url, index), button);
      return item;
    }));
  }
}

/** A small picture with its number as text. */
export function thumbnail(url, index) {
  const image = document.createElement("img");
  image.src = url;
  write(image, "picture", { number: index + 1 }, "alt");
  return image;
}
