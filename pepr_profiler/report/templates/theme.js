"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const modes = ["auto", "light", "dark"];
  const kept = () => { try { return localStorage.getItem("pepr-theme"); } catch { return null; } };
  const show = (mode) => {
    if (mode === "auto") delete root.dataset.theme; else root.dataset.theme = mode;
    button.textContent = `Colours: ${mode}`;
  };
  let mode = modes.includes(kept()) ? kept() : "auto";
  button.hidden = false;
  show(mode);
  button.addEventListener("click", () => {
    mode = modes[(modes.indexOf(mode) + 1) % modes.length];
    try { localStorage.setItem("pepr-theme", mode); } catch { /* a file may keep nothing */ }
    show(mode);
  });
})();
