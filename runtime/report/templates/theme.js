"use strict";
(() => {
  let stored = null;
  try { stored = localStorage.getItem("seqbuild-theme"); } catch { /* a file without storage */ }
  const dark = stored ? stored === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
