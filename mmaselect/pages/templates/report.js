'use strict';
// The table of scores is what is shown: this script holds no numbers.
const charts = document.querySelector('.charts');
const slider = charts.querySelector('input');
const tip = charts.querySelector('.tip');
const plots = [...charts.querySelectorAll('.plot')];
const cursors = [...charts.querySelectorAll('.cursor')];
const rows = [...document.querySelectorAll('#scores tbody tr')];
const names = [...document.querySelectorAll('#scores thead th')].map(cell => cell.textContent);
for (const element of document.querySelectorAll('.scripted')) element.hidden = false;

function line(kind, text) {
  const element = document.createElement(kind);
  element.textContent = text;
  return element;
}

function show(index) {
  const place = Number(rows[index].dataset.place);
  const texts = [...rows[index].cells].map((cell, column) => `${names[column]}${column ? ': ' : ' '}${cell.textContent}`);
  tip.replaceChildren(...texts.map((text, column) => line(column ? 'span' : 'b', text)));
  slider.value = index;
  slider.setAttribute('aria-valuetext', texts.join('; '));
  for (const cursor of cursors) {
    cursor.style.left = `${place}%`;
    cursor.hidden = false;
  }
  // On the side of the cursor that has more room.
  const x = plots[0].offsetLeft + place / 100 * plots[0].offsetWidth;
  tip.style.left = place < 50 ? `${x + 12}px` : 'auto';
  tip.style.right = place < 50 ? 'auto' : `${charts.offsetWidth - x + 12}px`;
  tip.style.top = `${plots[0].offsetTop}px`;
  tip.hidden = false;
}

function hide() {
  tip.hidden = true;
  for (const cursor of cursors) cursor.hidden = true;
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
