// Tables of three columns or more know the heads of their columns, so that they can be cards on a phone; figures that are
// wide for their height are marked, so that they keep their size there.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-article table")) {
    const heads = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    if (heads.length < 3) continue;
    table.classList.add("tl-cards");
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.children].forEach((cell, i) => {
        if (heads[i]) cell.setAttribute("data-label", heads[i]);
        if (!cell.textContent.trim()) cell.classList.add("tl-empty");
      });
    }
  }
  for (const image of document.querySelectorAll(".bd-article .cell_output img")) {
    const mark = () => image.naturalWidth > 2 * image.naturalHeight && image.parentElement.classList.add("tl-panels");
    image.complete ? mark() : image.addEventListener("load", mark);
  }
});
