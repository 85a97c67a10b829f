// Host: one HTML file. Annotations live in the browser's local storage, one entry per item, and leave as a file.

const given = JSON.parse(document.getElementById("task").textContent);
const root = document.getElementById("app");

function storage() {
  try {
    localStorage.setItem("s3ft:probe", "1");
    localStorage.removeItem("s3ft:probe");
    return localStorage;
  } catch {
    return null;
  }
}

function forget() {
  localStorage.removeItem("s3ft:annotator");
  location.reload();
}

function pageStore(task) {
  const kept = storage(), prefix = `s3ft:${task.id}:${task.annotator}:`;
  const store = {
    files: true,
    rename: kept && !given.annotator ? forget : null,
    load: () => {
      if (!kept) {
        addEventListener("beforeunload", (event) => event.preventDefault());
        queueMicrotask(() => store.onstatus?.("no_storage"));
        return {};
      }
      const found = {};
      for (const { id } of task.items) {
        try { const text = kept.getItem(prefix + id); if (text) found[id] = JSON.parse(text); } catch { /* a damaged entry is an open item */ }
      }
      return found;
    },
    save: ({ item, row, skipped }) => {
      if (!kept) return;
      try {
        if (row || skipped) kept.setItem(prefix + item, JSON.stringify({ row, skipped }));
        else kept.removeItem(prefix + item);
        store.onstatus?.("saved");
      } catch (error) {
        store.onstatus?.("failed", error.message);
      }
    },
    flush: () => {},
  };
  return store;
}

async function begin() {
  const language = given.language;
  let annotator = given.annotator || storage()?.getItem("s3ft:annotator") || "";
  if (!given.annotator && !annotator) {
    annotator = await askName({ root, words: given.words, language });
    try { localStorage.setItem("s3ft:annotator", annotator); } catch { /* asked again next time */ }
  }
  const task = { ...given, annotator };
  document.title = task.title || document.title;
  await render({ root, task, store: pageStore(task), language, wholePage: true });
}

begin();
