"use strict";
// Copy buttons; and, where no program answers, the list searched and filtered in the page itself.
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

const form = document.getElementById("ask");
if (form && form.dataset.served === "yes") {
  for (const field of form.querySelectorAll("select, input[type=checkbox]")) {
    field.addEventListener("change", () => form.requestSubmit());
  }
  form.addEventListener("submit", () => {  // an address without what was not asked for
    for (const field of form.elements) if (!field.value) field.disabled = true;
  });
  window.addEventListener("pageshow", () => { for (const field of form.elements) field.disabled = false; });
} else if (form) {
  const list = document.getElementById("papers");
  const items = [...list.children];
  const stem = (word) => word.length > 4 ? word.replace(/(ings?|ers?|ed|es|s|ly)$/, "") : word;
  const words = (text) => (text.toLowerCase().match(/[\p{L}\p{N}]+/gu) || []).map(stem);
  const papers = items.map((item) => {
    const weights = new Map();
    for (const [kind, weight] of [["h3 a", 6], [".title", 4], ["p:nth-of-type(2)", 2], [".tags", 1]]) {
      for (const word of words(item.querySelector(kind).textContent)) weights.set(word, Math.max(weight, weights.get(word) || 0));
    }
    for (const word of words(item.dataset.sought)) weights.set(word, Math.max(4, weights.get(word) || 0));
    return { item, weights };
  });
  const rare = (word) => Math.log(1 + papers.length / (1 + papers.filter((one) => one.weights.has(word)).length));
  const common = new Set(words("a an and are at be by can do for from how i in is it me my no not of on or so that the this to too we what when which with without you your"));

  const show = () => {
    const given = new FormData(form);
    const wanted = words(given.get("q")).filter((word) => !common.has(word)).map((word) => [word, rare(word)]);
    const kept = papers.filter(({ item }) =>
      ["part", "domain", "status", "training", "lossless"].every((name) => !given.get(name) || item.dataset[name] === given.get(name)));
    const scored = kept.map((one) => [wanted.reduce((sum, [word, weight]) => sum + weight * (one.weights.get(word) || 0), 0), one.item]);
    const found = wanted.length ? scored.filter(([score]) => score > 0).sort((a, b) => b[0] - a[0]) : scored;
    list.replaceChildren(...found.map(([, item]) => item));
    document.getElementById("count").textContent = `${found.length} paper${found.length === 1 ? "" : "s"}`;
    document.getElementById("nothing").hidden = found.length > 0;
  };
  const asked = new URLSearchParams(location.search);  // a search can be linked to
  for (const field of form.elements) {
    if (!field.name || !asked.has(field.name)) continue;
    if (field.type === "checkbox") field.checked = true; else field.value = asked.get(field.name);
  }
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  show();
}
