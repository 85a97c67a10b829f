// Host: a notebook widget (anywidget). Every annotation goes to Python at once, which writes it to a file and says so.

const PATIENCE = 10_000; // milliseconds before Python is taken to be gone

function widgetStore(model) {
  const waiting = new Map(); // submission -> change
  let loaded = null;
  const store = {
    load: () => new Promise((resolve) => { loaded = resolve; model.send({ type: "load" }); }),
    save: (change) => {
      waiting.set(change.submission, change);
      store.onstatus?.("saving");
      model.send({ type: "save", change });
      setTimeout(() => { if (waiting.has(change.submission)) store.onstatus?.("no_kernel", waiting.size); }, PATIENCE);
    },
    flush: () => {},
  };
  const listen = (message) => {
    if (message.type === "records") { loaded?.(message.records); loaded = null; }
    if (message.type === "saved") { waiting.delete(message.submission); if (!waiting.size) store.onstatus?.("saved"); }
    if (message.type === "refused") {
      store.onrefused?.(waiting.get(message.submission)?.item);
      waiting.delete(message.submission);
      store.onstatus?.("failed", message.why);
    }
  };
  model.on("msg:custom", listen);
  return { store, stop: () => model.off("msg:custom", listen) };
}

export default {
  async render({ model, el }) {
    const task = model.get("task"), root = document.createElement("div"), { store, stop } = widgetStore(model);
    el.append(root);
    const leave = await render({ root, task, store, language: task.language });
    return () => { leave(); stop(); };
  },
};
