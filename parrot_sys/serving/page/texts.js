// Texts of the page in the languages that somebody wrote them in, and a question about a picture in each.
// `name` is the language's own name. The server says which languages it offers; some of them may have no texts here.

export const TEXTS = {
  en: {
    name: "English", question: "What is in the picture?", skip: "Go to the message", language: "Language of the page",
    colours: "Colours", automatic: "System", light: "Light", dark: "Dark", reset: "New conversation",
    conversation: "Conversation", pictures: "Pictures of the next message", message: "Message",
    intro: "Attach a picture and ask about it in your language.",
    introExperts: "Below each answer you see which experts the text sent the picture to.",
    attach: "Add pictures", compare: "Ask in other languages", settings: "Settings", temperature: "Temperature",
    length: "Longest answer (tokens)", key: "API key", send: "Send", stop: "Stop", cancel: "Cancel", ask: "Ask",
    compareTitle: "The same pictures, asked in other languages",
    compareHelp: "Each question is asked alone, about the same pictures. Empty lines are left out.",
    needsPicture: "Attach a picture first.", notPicture: "{file} is not a picture that this browser can read.",
    tooMany: "Limit of pictures in a conversation: {count}.",
    remove: "Remove {file}", picture: "Picture {number}", you: "You", model: "Model", thinking: "The model answers.",
    finished: "The answer is complete.", stopped: "Stopped.", experts: "Picture {number}: weight of each expert",
    expert: "Expert {number}", equal: "The dotted line is an equal share.",
    partly: "Not every question was answered.",
    words: "Words that the router attended to", noRouting: "This model has no experts for pictures.",
    refused: "The server wants an API key: enter it under Settings.", unreachable: "The server cannot be reached: {reason}",
  },
  zh: {
    name: "中文", question: "图中是什么？", skip: "跳到消息框", language: "页面语言",
    colours: "配色", automatic: "跟随系统", light: "浅色", dark: "深色", reset: "新对话",
    conversation: "对话", pictures: "下一条消息的图片", message: "消息",
    intro: "添加一张图片，用您的语言提问。",
    introExperts: "每个回答下方会显示文字把图片交给了哪些专家。",
    attach: "添加图片", compare: "用其他语言提问", settings: "设置", temperature: "温度",
    length: "回答最大长度（词元）", key: "API 密钥", send: "发送", stop: "停止", cancel: "取消", ask: "提问",
    compareTitle: "同样的图片，用其他语言提问", compareHelp: "每个问题都针对同样的图片单独提出。空行会被忽略。",
    needsPicture: "请先添加图片。", notPicture: "{file} 不是浏览器能读取的图片。",
    tooMany: "一次对话中图片的上限：{count}。",
    remove: "移除 {file}", picture: "图片 {number}", you: "您", model: "模型", thinking: "模型正在回答。",
    finished: "回答完毕。", stopped: "已停止。", experts: "图片 {number}：各专家的权重",
    expert: "专家 {number}", equal: "虚线表示平均份额。",
    partly: "并非所有问题都得到了回答。",
    words: "路由器关注的词", noRouting: "该模型没有处理图片的专家。",
    refused: "服务器需要 API 密钥：请在“设置”中输入。", unreachable: "无法连接服务器：{reason}",
  },
  pt: {
    name: "Português", question: "O que há na imagem?", skip: "Ir para a mensagem", language: "Idioma da página",
    colours: "Cores", automatic: "Sistema", light: "Claro", dark: "Escuro", reset: "Nova conversa",
    conversation: "Conversa", pictures: "Imagens da próxima mensagem", message: "Mensagem",
    intro: "Anexe uma imagem e pergunte sobre ela no seu idioma.",
    introExperts: "Abaixo de cada resposta você vê a quais especialistas o texto enviou a imagem.",
    attach: "Adicionar imagens", compare: "Perguntar em outros idiomas", settings: "Configurações", temperature: "Temperatura",
    length: "Resposta mais longa (tokens)", key: "Chave da API", send: "Enviar", stop: "Parar", cancel: "Cancelar", ask: "Perguntar",
    compareTitle: "As mesmas imagens, perguntadas em outros idiomas",
    compareHelp: "Cada pergunta é feita sozinha, sobre as mesmas imagens. Linhas vazias são ignoradas.",
    needsPicture: "Anexe uma imagem primeiro.", notPicture: "{file} não é uma imagem que este navegador consiga ler.",
    tooMany: "Limite de imagens por conversa: {count}.",
    remove: "Remover {file}", picture: "Imagem {number}", you: "Você", model: "Modelo", thinking: "O modelo está respondendo.",
    finished: "A resposta está completa.", stopped: "Interrompido.", experts: "Imagem {number}: peso de cada especialista",
    expert: "Especialista {number}", equal: "A linha pontilhada é uma parte igual.",
    partly: "Nem todas as perguntas foram respondidas.",
    words: "Palavras a que o roteador prestou atenção", noRouting: "Este modelo não tem especialistas para imagens.",
    refused: "O servidor exige uma chave da API: informe-a em Configurações.", unreachable: "Não foi possível acessar o servidor: {reason}",
  },
  ar: {
    name: "العربية", question: "ماذا يوجد في الصورة؟", skip: "انتقل إلى الرسالة", language: "لغة الصفحة",
    colours: "الألوان", automatic: "النظام", light: "فاتح", dark: "داكن", reset: "محادثة جديدة",
    conversation: "المحادثة", pictures: "صور الرسالة التالية", message: "الرسالة",
    intro: "أرفق صورة واسأل عنها بلغتك.",
    introExperts: "تحت كل إجابة ترى الخبراء الذين أرسل النص الصورة إليهم.",
    attach: "إضافة صور", compare: "اسأل بلغات أخرى", settings: "الإعدادات", temperature: "درجة الحرارة",
    length: "أطول إجابة (رموز)", key: "مفتاح API", send: "إرسال", stop: "إيقاف", cancel: "إلغاء", ask: "اسأل",
    compareTitle: "الصور نفسها بلغات أخرى", compareHelp: "يُطرح كل سؤال وحده عن الصور نفسها. تُهمل الأسطر الفارغة.",
    needsPicture: "أرفق صورة أولاً.", notPicture: "‏{file} ليس صورة يمكن لهذا المتصفح قراءتها.",
    tooMany: "الحد الأقصى للصور في المحادثة: {count}.",
    remove: "إزالة {file}", picture: "الصورة {number}", you: "أنت", model: "النموذج", thinking: "النموذج يجيب.",
    finished: "اكتملت الإجابة.", stopped: "توقف.", experts: "الصورة {number}: وزن كل خبير",
    expert: "الخبير {number}", equal: "الخط المنقط هو الحصة المتساوية.",
    partly: "لم تتم الإجابة عن جميع الأسئلة.",
    words: "الكلمات التي انتبه إليها الموجّه", noRouting: "ليس لهذا النموذج خبراء للصور.",
    refused: "يتطلب الخادم مفتاح API: أدخله في الإعدادات.", unreachable: "تعذر الوصول إلى الخادم: {reason}",
  },
  tr: {
    name: "Türkçe", question: "Resimde ne var?", skip: "Mesaja git", language: "Sayfanın dili",
    colours: "Renkler", automatic: "Sistem", light: "Açık", dark: "Koyu", reset: "Yeni konuşma",
    conversation: "Konuşma", pictures: "Sonraki mesajın resimleri", message: "Mesaj",
    intro: "Bir resim ekleyin ve kendi dilinizde sorun.",
    introExperts: "Her yanıtın altında metnin resmi hangi uzmanlara gönderdiğini görürsünüz.",
    attach: "Resim ekle", compare: "Başka dillerde sor", settings: "Ayarlar", temperature: "Sıcaklık",
    length: "En uzun yanıt (token)", key: "API anahtarı", send: "Gönder", stop: "Durdur", cancel: "Vazgeç", ask: "Sor",
    compareTitle: "Aynı resimler, başka dillerde soruldu", compareHelp: "Her soru aynı resimler hakkında tek başına sorulur. Boş satırlar atlanır.",
    needsPicture: "Önce bir resim ekleyin.", notPicture: "{file} bu tarayıcının okuyabildiği bir resim değil.",
    tooMany: "Bir konuşmadaki en fazla resim sayısı: {count}.",
    remove: "{file} resmini kaldır", picture: "Resim {number}", you: "Siz", model: "Model", thinking: "Model yanıtlıyor.",
    finished: "Yanıt tamamlandı.", stopped: "Durduruldu.", experts: "Resim {number}: her uzmanın ağırlığı",
    expert: "Uzman {number}", equal: "Noktalı çizgi eşit paydır.",
    partly: "Soruların hepsi yanıtlanmadı.",
    words: "Yönlendiricinin dikkat ettiği sözcükler", noRouting: "Bu modelde resimler için uzman yok.",
    refused: "Sunucu bir API anahtarı istiyor: Ayarlar bölümüne girin.", unreachable: "Sunucuya ulaşılamıyor: {reason}",
  },
  ru: {
    name: "Русский", question: "Что изображено на картинке?", skip: "Перейти к сообщению", language: "Язык страницы",
    colours: "Цвета", automatic: "Как в системе", light: "Светлые", dark: "Тёмные", reset: "Новый разговор",
    conversation: "Разговор", pictures: "Картинки следующего сообщения", message: "Сообщение",
    intro: "Приложите картинку и спросите о ней на своём языке.",
    introExperts: "Под каждым ответом видно, каким экспертам текст направил картинку.",
    attach: "Добавить картинки", compare: "Спросить на других языках", settings: "Настройки", temperature: "Температура",
    length: "Наибольшая длина ответа (токены)", key: "Ключ API", send: "Отправить", stop: "Стоп", cancel: "Отмена", ask: "Спросить",
    compareTitle: "Те же картинки, вопрос на других языках", compareHelp: "Каждый вопрос задаётся отдельно о тех же картинках. Пустые строки пропускаются.",
    needsPicture: "Сначала приложите картинку.", notPicture: "{file} - не картинка, которую может прочитать этот браузер.",
    tooMany: "Наибольшее число картинок в разговоре: {count}.",
    remove: "Убрать {file}", picture: "Картинка {number}", you: "Вы", model: "Модель", thinking: "Модель отвечает.",
    finished: "Ответ готов.", stopped: "Остановлено.", experts: "Картинка {number}: вес каждого эксперта",
    expert: "Эксперт {number}", equal: "Пунктир - равная доля.",
    partly: "Ответ дан не на все вопросы.",
    words: "Слова, на которые смотрел маршрутизатор", noRouting: "У этой модели нет экспертов для картинок.",
    refused: "Серверу нужен ключ API: введите его в настройках.", unreachable: "Сервер недоступен: {reason}",
  },
};

const RIGHT_TO_LEFT = new Set(["Adlm", "Arab", "Hebr", "Nkoo", "Rohg", "Syrc", "Thaa"]);
let current = "en";

const languageOf = (code) => new Intl.Locale(code).language;
const scriptOf = (code) => new Intl.Locale(code).maximize().script;

/** Name of a language in itself, as far as the browser knows it. */
export function languageName(code) {
  return TEXTS[code]?.name ?? new Intl.DisplayNames([code], { type: "language" }).of(code);
}

/** A question about a picture in a language; empty where nobody wrote one. */
export function questionIn(code) {
  const language = languageOf(code);
  return language in TEXTS && scriptOf(language) === scriptOf(code) ? TEXTS[language].question : "";
}

/** Of the languages that are offered the first that the browser asks for, else the first. */
export function preferredLanguage(offered) {
  for (const wanted of navigator.languages) {
    const found = offered.find((code) => code === wanted) ?? offered.find((code) => languageOf(code) === languageOf(wanted));
    if (found) return found;
  }
  return offered[0];
}

/** Text of a key in the language of the page, with `{name}` filled in. */
export function text(key, values = {}) {
  return TEXTS[current][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function draw(element) {
  const { text: content, label, alt, values = "{}" } = element.dataset;
  const filled = JSON.parse(values);
  if (content) element.textContent = text(content, filled);
  if (label) element.setAttribute("aria-label", text(label, filled));
  if (alt) element.alt = text(alt, filled);
}

/** Writes a text of the page into an element, and anew when the language changes: its content, `label` or `alt`. */
export function write(element, key, values = {}, place = "text") {
  element.dataset[place] = key;
  element.dataset.values = JSON.stringify(values);
  if (place === "text") element.removeAttribute("lang");
  draw(element);
}

/** Writes a text that is in a language of its own; none leaves the element empty. */
export function writeForeign(element, content = "", language = "") {
  delete element.dataset.text;
  element.textContent = content;
  element.lang = language;
}

/** Sets the language of the page: its texts, labels and direction. One without texts leaves the page as it is. */
export function setLanguage(code) {
  if (languageOf(code) in TEXTS) current = languageOf(code);
  document.documentElement.lang = current;
  document.documentElement.dir = RIGHT_TO_LEFT.has(scriptOf(current)) ? "rtl" : "ltr";
  document.querySelectorAll("[data-text], [data-label], [data-alt]").forEach(draw);
  document.getElementById("message").placeholder = text("question");
}
