// The theme, before anything is drawn: a classic script, so that a page in the other theme never flashes up.
"use strict";

(() => {
  const KEY = "ggufloop.theme";
  const NEXT = { auto: "light", light: "dark", dark: "auto" };
  const SPOKEN = { auto: "as the system", light: "light", dark: "dark" };

  function read() {
    try {
      const theme = localStorage.getItem(KEY);
      return theme in NEXT ? theme : "auto";
    } catch {
      return "auto"; // storage can be forbidden
    }
  }

  function apply(theme) {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) {
      button.setAttribute("aria-label", `Theme: ${SPOKEN[theme]}`);
      button.title = `Theme: ${SPOKEN[theme]}`;
    }
  }

  apply(read());
  document.addEventListener("DOMContentLoaded", () => {
    let theme = read();
    apply(theme);
    document.getElementById("theme").addEventListener("click", () => {
      theme = NEXT[theme];
      try {
        localStorage.setItem(KEY, theme);
      } catch { /* it holds for this page then */ }
      apply(theme);
    });
  });
})();
