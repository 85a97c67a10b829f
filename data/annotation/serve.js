// Host: `s3ft annotate serve`. The token stays behind the # of the address, which browsers never send by themselves.
// A change waits in local storage until the server has confirmed it, so neither side may crash at a bad moment.

const root = document.getElementById("app");
const words = JSON.parse(document.getElementById("words").textContent);
const token = decodeURIComponent(location.hash.slice(1));
const language = navigator.language?.startsWith("zh") ? "zh" : "en";
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const ask = (path, body) => fetch(path, {
  method: body ? "POST" : "GET", credentials: "omit", cache: "no-store", referrerPolicy: "no-referrer",
  headers: { Authorization: `Bearer ${token}`, ...(body ? { "Content-Type": "application/json" } : {}) },
  body: body && JSON.stringify(body), signal: AbortSignal.timeout?.(20_000),
});

function outbox(prefix) {
  let memory = [], count = 0;
  const keys = () => { try { return Object.keys(localStorage).filter((key) => key.startsWith(prefix)).sort(); } catch { return []; } };
  return {
    add: (change) => {
      const key = `${prefix}${String(Date.now()).padStart(15, "0")}-${String(count++).padStart(6, "0")}-${change.submission}`;
      try { localStorage.setItem(key, JSON.stringify(change)); } catch { memory.push([key, change]); }
    },
    all: () => [...keys().flatMap((key) => { try { return [[key, JSON.parse(localStorage.getItem(key))]]; } catch { return []; } }), ...memory],
    remove: (key) => { try { localStorage.removeItem(key); } catch { /* it was in memory */ } memory = memory.filter(([one]) => one !== key); },
  };
}

function serverStore(task, records) {
  const box = outbox(`s3ft:waiting:${task.id}:${task.annotator}:`);
  let running = false, refused = null;
  async function drain() {
    if (running) return;
    running = true;
    for (let wait = 250; box.all().length; ) {
      const [key, change] = box.all()[0];
      let response = null;
      try { response = await ask("api/change", change); } catch { /* not connected */ }
      if (response?.ok) { box.remove(key); wait = 250; continue; }
      if (response && response.status >= 400 && response.status < 500 && ![401, 403, 408, 429].includes(response.status)) {
        box.remove(key);
        refused = (await response.json().catch(() => ({}))).error ?? response.statusText;
        store.onrefused?.(change.item);
        continue;
      }
      store.onstatus?.(response?.status === 401 ? "bad_link" : "waiting", box.all().length);
      await pause(wait);
      wait = Math.min(wait * 2, 5000);
    }
    running = false;
    store.onstatus?.(refused ? "failed" : "saved", refused);
    refused = null;
  }
  const store = {
    load: () => {
      for (const [, { item, row, skipped }] of box.all()) records[item] = { row, skipped };
      drain();
      return records;
    },
    save: (change) => { box.add(change); store.onstatus?.("saving"); drain(); },
    flush: drain,
  };
  addEventListener("online", drain);
  return store;
}

async function begin() {
  for (let wait = 500; ; wait = Math.min(wait * 2, 5000)) {
    const response = token ? await ask("api/task").catch(() => null) : { status: 401 };
    if (response?.status === 401) return tell({ root, words, language, name: "bad_link" });
    if (response?.ok) {
      const { task, records } = await response.json();
      document.title = task.title || document.title;
      return render({ root, task, store: serverStore(task, records), language: task.language, wholePage: true });
    }
    tell({ root, words, language, name: "no_server" });
    await pause(wait);
  }
}

addEventListener("hashchange", () => location.reload());
begin();
