// The box beside the mouse or the cursor.

const tip = document.getElementById("tip");

export function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - box.width - 8))}px`;
  const below = y + 16 + box.height < innerHeight;
  tip.style.top = `${below ? y + 16 : Math.max(8, y - box.height - 16)}px`;
}

export function hideTip() {
  tip.hidden = true;
}
