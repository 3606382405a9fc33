"use strict";

const $ = (id) => document.getElementById(id);

// What the server answered, and per token: how many heads of the selection hold it, their errors.
let memory = null;
let held = [];

// Where the page came from is where to ask; a proxy may have put something before the route.
const server = location.href.split(/[?#]/)[0].replace(/\/v1\/lola\/inspector\/?$/, "");

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("run").disabled = true;
  say("Reading …");
  try {
    show(await ask());
    say("");
  } catch (error) {
    $("result").hidden = true;
    say(error.message, true);
  }
  $("run").disabled = false;
});

// A session's tokens are read as a prompt: the same tokens give the same memory.
for (const radio of document.querySelectorAll("[name=kind]"))
  radio.addEventListener("change", async () => {
    const stored = kind() === "session";
    $("stored").hidden = !stored;
    $("prompt").required = !stored;
    if (!stored) return;
    try {
      const { sessions } = await request("/v1/lola/sessions");
      $("session").replaceChildren(...sessions.map(({ session, turn, tokens }) =>
        new Option(`${session} (turn ${turn}, ${tokens} tokens)`, session)));
      say(sessions.length ? "" : "The server has no stored sessions.");
    } catch (error) {
      say(error.message, true);
    }
  });

function kind() {
  return document.querySelector("[name=kind]:checked").value;
}

async function ask() {
  const text = $("prompt").value;
  const bodies = {
    prompt: async () => ({ prompt: text }),
    messages: async () => ({ messages: [{ role: "user", content: text }] }),
    session: async () => {
      if (!$("session").value) throw new Error("The server has no stored sessions.");
      const { tokens } = await request(`/v1/lola/sessions/${$("session").value}/tokens`);
      return { prompt: tokens };
    },
  };
  return request("/v1/lola/memory", await bodies[kind()]());
}

async function request(path, body) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(server + path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
  }).catch((error) => {
    throw new Error(`No answer from ${server}: ${error.message}`);
  });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    const reason = answer.error?.message ?? answer.error ?? response.statusText;
    throw new Error(response.status === 401 ? "The server wants its API key." : String(reason));
  }
  return answer;
}

function say(text, error = false) {
  $("status").textContent = text;
  $("status").className = error ? "error" : "";
}

function show(answer) {
  memory = answer;
  // 0 is all of them.
  $("layer").max = memory.layers.length;
  $("head").max = Math.max(...memory.layers.map((layer) => layer.heads.length));
  $("layer").value = $("head").value = 0;
  const spans = memory.tokens.map((id, position) => {
    const span = document.createElement("span");
    span.className = `token ${place(position)}`;
    span.dataset.position = position;
    span.textContent = memory.texts === null ? `${id} ` : memory.texts[position];
    return span;
  });
  $("text").replaceChildren(...spans);
  $("result").hidden = false;
  paint();
}

function place(position) {
  if (position < memory.sinks) return "sink";
  return position >= memory.window_start ? "window" : "past";
}

function selected() {
  const layer = Number($("layer").value);
  const head = Number($("head").value);
  $("layer-name").textContent = layer ? memory.layers[layer - 1].layer : "all";
  $("head-name").textContent = head ? head - 1 : "all";
  return memory.layers
    .filter((_, index) => !layer || index === layer - 1)
    .flatMap(({ heads }) => heads.filter((_, index) => !head || index === head - 1));
}

function paint() {
  const heads = selected();
  held = memory.tokens.map(() => []);
  for (const { positions, errors } of heads)
    positions.forEach((position, index) => held[position].push(errors[index]));
  for (const span of $("text").children) {
    const share = held[span.dataset.position].length / Math.max(1, heads.length);
    span.style.background = colour(share);
    span.style.color = share > 0.25 ? "#000" : "";
    span.dataset.held = held[span.dataset.position].length;
  }
  const kept = held.filter((errors) => errors.length).length;
  $("summary").textContent =
    `${memory.num_tokens} tokens; ${kept} held by at least one of ${heads.length} ` +
    `heads, which hold ${memory.sparse_cache_size} each at most; ` +
    `${memory.folded} folded in every head`;
}

function colour(share) {
  // The root, so that a token held by one head of many can be seen.
  return share ? `hsl(var(--hue) 95% ${88 - 33 * share}% / ${Math.sqrt(share)})` : "transparent";
}

for (const id of ["layer", "head"]) $(id).addEventListener("input", paint);

$("scale").style.background =
  `linear-gradient(to right, ${[0, 0.1, 0.25, 0.5, 0.75, 1].map(colour).join(", ")})`;

$("text").addEventListener("mouseover", ({ target, clientX, clientY }) => {
  if (!target.classList.contains("token")) return;
  $("tip").textContent = describe(Number(target.dataset.position));
  $("tip").hidden = false;
  const box = $("tip").getBoundingClientRect();
  $("tip").style.left = `${Math.min(clientX + 12, innerWidth - box.width - 8)}px`;
  $("tip").style.top = `${Math.min(clientY + 16, innerHeight - box.height - 8)}px`;
});
$("text").addEventListener("mouseout", () => { $("tip").hidden = true; });

function describe(position) {
  const text = memory.texts === null ? "" : `${JSON.stringify(memory.texts[position])}, `;
  const lines = [`${text}position ${position}, id ${memory.tokens[position]}`];
  const errors = held[position];
  const where = place(position);
  if (where === "sink") lines.push("a sink: exact in every head");
  else if (where === "window") lines.push("in the window: exact in every head");
  else if (!errors.length) lines.push("in the hidden state of every head selected");
  else {
    const name = memory.error === "sre" ? "recall error" : "relative recall error";
    const mean = errors.reduce((sum, error) => sum + error, 0) / errors.length;
    lines.push(`held by ${errors.length} of ${selected().length} heads`);
    lines.push(
      errors.length === 1
        ? `${name} ${mean.toPrecision(4)}`
        : `${name} ${mean.toPrecision(4)} on average, ` +
          `${Math.min(...errors).toPrecision(4)} to ${Math.max(...errors).toPrecision(4)}`,
    );
  }
  return lines.join("\n");
}
