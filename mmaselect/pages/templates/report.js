'use strict';
// The table of scores is what is shown: this script holds no numbers.
const charts = document.querySelector('.charts');
const slider = charts.querySelector('input');
const plots = [...charts.querySelectorAll('.plot')];
const marks = [...charts.querySelectorAll('.cursor, .tip')];
const rows = [...document.querySelectorAll('#scores tbody tr')];
const names = [...document.querySelectorAll('#scores thead th')].map(cell => cell.textContent);
for (const element of document.querySelectorAll('.scripted')) element.hidden = false;

function show(index) {
  const place = Number(rows[index].dataset.place);
  const texts = [...rows[index].cells].map(cell => cell.textContent);
  for (const mark of marks) mark.hidden = false;
  plots.forEach((plot, number) => {
    const tip = plot.querySelector('.tip');
    tip.textContent = `${texts[0]}: ${texts[number + 1]}`;
    plot.querySelector('.cursor').style.left = `${place}%`;
    // On the side that has more room, and off the curve.
    tip.style.left = place < 50 ? `calc(${place}% + 12px)` : 'auto';
    tip.style.right = place < 50 ? 'auto' : `calc(${100 - place}% + 12px)`;
    const above = Number(rows[index].cells[number + 1].dataset.top) > 50;
    tip.style.top = above ? '4px' : 'auto';
    tip.style.bottom = above ? 'auto' : '4px';
  });
  slider.value = index;
  slider.setAttribute('aria-valuetext', texts.map((text, column) => `${names[column]} ${text}`).join('; '));
}

function hide() {
  for (const mark of marks) mark.hidden = true;
}

function point(event) {
  const area = event.currentTarget.getBoundingClientRect();
  const place = 100 * (event.clientX - area.left) / area.width;
  const distances = rows.map(row => Math.abs(Number(row.dataset.place) - place));
  show(distances.indexOf(Math.min(...distances)));
}

for (const plot of plots) {
  plot.addEventListener('pointerdown', point);
  plot.addEventListener('pointermove', point);
  // A finger that is lifted leaves the values where they are.
  plot.addEventListener('pointerleave', event => { if (event.pointerType === 'mouse') hide(); });
}
slider.addEventListener('input', () => show(Number(slider.value)));
slider.addEventListener('focus', () => show(Number(slider.value)));
slider.addEventListener('blur', hide);
document.addEventListener('keydown', event => { if (event.key === 'Escape') hide(); });
