"""The player of an explorer: templates of a page's own HTML, style and script."""

import string

PAUSE = 150  # milliseconds from frame to frame

SLIDER = string.Template(
    '<label style="flex:1 1 14em;min-width:0;margin:0">'
    '<span>$label = <output style="font-variant-numeric:tabular-nums">$text</output></span>'
    '<input type="range" min="0" max="$last" value="$middle" step="1" aria-label="$label" aria-valuetext="$text" '
    'style="display:block;width:100%;margin:.2em 0;accent-color:#0072B2"></label>'
)

PLAYER = string.Template(
    """<div class="tl-player" data-key="$key" style="box-sizing:border-box;max-width:calc(${width}px + 1em);\
margin:0 auto;padding:.5em;border-radius:6px;background:#FFF;color:#1A1A1A;color-scheme:light">
<img src="data:image/webp;base64,$base" alt="$alt" width="$width" height="$height" \
style="display:block;width:100%;height:auto;filter:none;background:#FFF 0 0/100% 100% no-repeat">
<div style="display:flex;gap:.8em;align-items:center;margin-top:.4em">
<button type="button" style="width:4.5em;padding:.3em 0;border:1px solid #9AA7B5;border-radius:4px;\
background:#F3F5F8;color:inherit;font:inherit;cursor:pointer">Play</button>
<div style="flex:1;min-width:0;display:flex;flex-wrap:wrap;gap:.2em 1.5em">$sliders</div></div>
<script>(() => {
  const prefix = "data:image/webp;base64,", frames = $frames, texts = $texts;
  const play = box => {
    const image = box.querySelector("img"), button = box.querySelector("button");
    const sliders = [...box.querySelectorAll("input")], outputs = box.querySelectorAll("output");
    let timer = 0;
    const show = () => {
      let k = 0;
      sliders.forEach((slider, i) => {
        const text = texts[i][slider.value];
        k = k * texts[i].length + Number(slider.value);
        slider.setAttribute("aria-valuetext", text);
        outputs[i].value = text;
      });
      image.src = prefix + frames[k];
    };
    const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
    const step = () => {
      if (!box.isConnected) return stop();
      sliders[0].value = (Number(sliders[0].value) + 1) % texts[0].length;
      show();
    };
    image.style.backgroundImage = `url("$${image.src}")`;
    sliders.forEach(slider => slider.addEventListener("input", () => { stop(); show(); }));
    button.addEventListener("click", () => {
      if (timer) return stop();
      button.textContent = "Pause";
      timer = setInterval(step, $pause);
    });
    show();
  };
  const start = tries => {
    const boxes = document.querySelectorAll('.tl-player[data-key="$key"]:not([data-ready])');
    boxes.forEach(box => { box.dataset.ready = ""; play(box); });
    if (!boxes.length && tries) setTimeout(start, 50, tries - 1);
  };
  start(100);
})();</script>
</div><!-- tl-player -->"""
)
