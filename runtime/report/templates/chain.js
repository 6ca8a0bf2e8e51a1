"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const name = () => { button.textContent = root.dataset.theme === "dark" ? "Light theme" : "Dark theme"; };
  button.hidden = false;
  name();
  button.addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("seqbuild-theme", root.dataset.theme); } catch { /* a file without storage */ }
    name();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => {
    root.dataset.theme = event.matches ? "dark" : "light";
    name();
  });

  const links = [...document.querySelectorAll("li.link")];
  const codes = new Map(links.map((link) => [link.dataset.code, ""]));
  for (const code of codes.keys()) {
    const element = document.querySelector(`#code-${Number(code)} pre`);
    codes.set(code, element ? element.textContent.toLowerCase() : "");
  }
  const texts = links.map((link) => link.textContent.toLowerCase() + codes.get(link.dataset.code));
  const shown = document.getElementById("shown");
  document.getElementById("filter").addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    let count = 0;
    links.forEach((link, index) => {
      link.hidden = !texts[index].includes(wanted);
      count += link.hidden ? 0 : 1;
    });
    shown.textContent = wanted ? `${count} of ${links.length} subgraphs` : "";
  });
  const all = document.getElementById("open");
  all.addEventListener("click", () => {
    const open = all.textContent === "Open all";
    for (const link of links) link.querySelector("details").open = open;
    all.textContent = open ? "Close all" : "Open all";
  });
  addEventListener("hashchange", () => {
    let element = document.getElementById(location.hash.slice(1));
    while (element) {
      if (element.tagName === "DETAILS") element.open = true;
      element = element.parentElement;
    }
    document.getElementById(location.hash.slice(1))?.scrollIntoView();
  });
})();
