// What a page does by itself: it keeps the reader's choice of theme, and draws a figure once it comes near.
"use strict";

const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
const store = (theme) => { try { localStorage.setItem("theme", theme); } catch { /* a page opened from a folder */ } };
const show = (theme) => { document.documentElement.style.colorScheme = theme || "light dark"; };
show(stored());

function themeButton() {
  const button = document.getElementById("theme");
  const dark = () => {
    const theme = document.documentElement.style.colorScheme;
    return theme === "light dark" ? matchMedia("(prefers-color-scheme: dark)").matches : theme === "dark";
  };
  const label = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    store(theme);
    show(theme);
    label();
  });
  label();
  button.hidden = false;
}

async function draw(figure) {
  const live = figure.querySelector(".live");
  const content = JSON.parse(figure.querySelector("script").textContent);
  live.hidden = false;
  figure.querySelector(".still").hidden = true;
  await Plotly.newPlot(live, { ...content, config: { displaylogo: false } });
  figure.dataset.drawn = "yes";
}

document.addEventListener("DOMContentLoaded", () => {
  themeButton();
  if (innerWidth < 1088) document.querySelector(".sections details")?.removeAttribute("open");  // 68rem in style.css
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((found) => found.isIntersecting)) {
      near.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll("figure.interactive").forEach((figure) => near.observe(figure));
});
