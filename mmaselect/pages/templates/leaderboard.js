'use strict';
const form = document.querySelector('form');
const selects = [...form.querySelectorAll('select')];
const rows = [...document.querySelectorAll('tbody tr')];

function key(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value ?? cell.textContent.trim();
}

function compare(one, other, sign) {
  // What is empty comes last, whichever way the others go.
  if (!one || !other) return Number(!one) - Number(!other);
  const [left, right] = [Number(one), Number(other)];
  if (!Number.isNaN(left) && !Number.isNaN(right)) return sign * (left - right);
  return sign * one.localeCompare(other, 'en', {numeric: true});
}

function sort(head) {
  const direction = head.getAttribute('aria-sort') === 'ascending' ? 'descending' : 'ascending';
  for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', direction);
  const sign = direction === 'ascending' ? 1 : -1;
  const body = head.closest('table').tBodies[0];
  body.append(...[...body.rows].sort((one, other) => compare(key(one, head.cellIndex), key(other, head.cellIndex), sign)));
}

function filter() {
  for (const row of rows) {
    row.hidden = selects.some(select => select.value && row.getAttribute(`data-${select.name.replace(' ', '-')}`) !== select.value);
  }
  for (const section of document.querySelectorAll('section')) {
    section.hidden = !section.querySelector('tbody tr:not([hidden])');
  }
  form.querySelector('output').textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} entries`;
}

for (const button of document.querySelectorAll('th button')) {
  button.addEventListener('click', () => sort(button.closest('th')));
}
form.addEventListener('change', filter);
form.addEventListener('submit', event => event.preventDefault());
form.addEventListener('reset', () => {
  // The form itself does it only after this event.
  for (const select of selects) select.value = '';
  filter();
});
filter();
