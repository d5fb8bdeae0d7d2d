// Tables of three columns or more know the heads of their columns, so that they can be cards on a phone.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-article table")) {
    const heads = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    const cells = [...table.querySelectorAll("tbody td:not(:first-child)")];
    if (heads.length < 3 || cells.every((td) => td.textContent.length < 14)) continue; // numbers alone fit side by side
    table.classList.add("tl-cards");
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.children].forEach((cell, i) => {
        if (heads[i]) cell.setAttribute("data-label", heads[i]);
        if (!cell.textContent.trim()) cell.classList.add("tl-empty");
      });
    }
  }
  for (const toggle of document.querySelectorAll("nav .has-children > details > summary")) toggle.setAttribute("aria-label", "Pages of this chapter");
  // what is wide for a phone keeps its size there and scrolls: plots, drawings, explorers
  for (const image of document.querySelectorAll(".bd-article .cell_output img")) {
    const player = image.closest(".tl-player"), mark = () => {
      const { naturalWidth: width, naturalHeight: height } = image, { classList } = player || image.parentElement;
      if (width > 2 * height || width > 760) classList.add("tl-panels");
      if (width > 3.2 * height) classList.add("tl-wide");
    };
    image.complete ? mark() : image.addEventListener("load", mark, { once: true });
  }
  // the type of a printed table is as small as its longest line asks for
  for (const printed of document.querySelectorAll(".bd-article .cell_output pre")) {
    const lines = printed.textContent.split("\n").map((line) => line.length).filter((length) => length <= 125);
    if (lines.length > 4) printed.style.setProperty("--tl-columns", Math.max(...lines));
  }
  for (const drawing of document.querySelectorAll(".bd-article figure svg.tl-d")) {
    const { width, height } = drawing.viewBox.baseVal;
    if (width > 2 * height && width > 400) drawing.parentElement.classList.add("tl-panels");
  }
});
