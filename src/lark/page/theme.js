"use strict";
// Before anything is painted: the theme that was chosen on this page earlier, else the system's.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("lark-theme");
  } catch (error) {
    if (!(error instanceof DOMException)) throw error; // storage may be switched off
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = chosen === "dark" || chosen === "light" ? chosen : dark ? "dark" : "light";
})();
