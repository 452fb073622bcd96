// The board: a picture once for each model, with numbered marks over it. A drag is a box, a click a point, and with the
// button pressed any line a scribble. What is drawn goes to the server as `mark`; what is there comes back as `value`.
const SVG = "http://www.w3.org/2000/svg";
const CLICK = 5; // CSS pixels that the pointer may move in a click
const stage = element.querySelector(".stage");
const pen = element.querySelector(".pen");
let scribbling = false;
let drag = null; // {pane, path: [[x, y], ...] in pixels of the picture, from: [clientX, clientY], far: moved more than a click}

function add(parent, tag, attributes, namespace) {
  const node = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.appendChild(node);
  return node;
}

function shape(svg, kind, box, points, colour, more) {
  const look = { ...more, fill: "none", "vector-effect": "non-scaling-stroke", "stroke-linejoin": "round", "stroke-linecap": "round" };
  const line = { points: points.map((point) => point.join(",")).join(" ") };
  const edge = { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] };
  for (const [stroke, wide] of [["white", 2], [colour, 0]]) {
    if (kind === "point") {
      add(svg, "rect", { ...look, ...edge, stroke, "stroke-width": 1.5 + wide / 2, "stroke-dasharray": "4 5" }, SVG);
      const [x, y] = points[0];
      add(svg, "line", { ...look, x1: x, y1: y, x2: x + 1e-4, y2: y, stroke, "stroke-width": 12 + 2 * wide }, SVG);
    } else if (kind === "scribble") add(svg, "polyline", { ...look, ...line, stroke, "stroke-width": 4 + wide }, SVG);
    else add(svg, "rect", { ...look, ...edge, stroke, "stroke-width": 3 + wide }, SVG);
  }
}

function draw() {
  const board = props.value;
  stage.classList.toggle("empty", !board);
  const panes = board ? board.panes : [];
  while (stage.children.length > panes.length) stage.lastChild.remove();
  panes.forEach((pane, index) => {
    const node = stage.children[index] || makePane();
    node.querySelector(".name").textContent = pane.title;
    const image = node.querySelector("img");
    if (image.getAttribute("src") !== board.picture) image.src = board.picture;
    const sheet = node.querySelector(".sheet");
    sheet.style.aspectRatio = `${board.width} / ${board.height}`;
    sheet.style.maxWidth = `calc(${Math.min(1, board.width / board.height)} * min(54vh, 480px))`;
    const svg = node.querySelector("svg");
    svg.setAttribute("viewBox", `0 0 ${board.width} ${board.height}`);
    svg.replaceChildren();
    sheet.querySelectorAll(".tag").forEach((tag) => tag.remove());
    for (const mark of pane.marks) {
      const link = `mark n${mark.number}${mark.shown ? "" : " past"}`;
      const group = add(svg, "g", { class: link }, SVG);
      shape(group, mark.kind, mark.box, mark.points, mark.colour, {});
      const inside = mark.box[1] < board.height * 0.08;
      const tag = add(sheet, "button", { type: "button", class: `tag ${link}${inside ? " inside" : ""}`, title: mark.title });
      tag.style.left = `${(100 * mark.box[0]) / board.width}%`;
      tag.style.top = `${(100 * mark.box[1]) / board.height}%`;
      tag.style.backgroundColor = mark.colour;
      tag.textContent = mark.number;
      tag.addEventListener("click", () => trigger("mention", { number: mark.number }));
    }
  });
}

function makePane() {
  const node = add(stage, "figure", { class: "pane" });
  add(node, "figcaption", { class: "name" });
  const sheet = add(node, "div", { class: "sheet" });
  add(sheet, "img", { alt: "The picture of the chat", draggable: "false" });
  add(sheet, "svg", { preserveAspectRatio: "none" }, SVG);
  sheet.addEventListener("pointerdown", begin);
  sheet.addEventListener("pointermove", move);
  sheet.addEventListener("pointerup", end);
  sheet.addEventListener("pointercancel", () => finish());
  return node;
}

function place(sheet, event) {
  const edge = sheet.getBoundingClientRect();
  const clip = (value) => Math.min(Math.max(value, 0), 1);
  return [
    clip((event.clientX - edge.left) / edge.width) * props.value.width,
    clip((event.clientY - edge.top) / edge.height) * props.value.height,
  ];
}

function begin(event) {
  if (event.button !== 0 || event.target.closest(".tag")) return;
  event.preventDefault();
  const sheet = event.currentTarget;
  sheet.setPointerCapture(event.pointerId);
  drag = { sheet, path: [place(sheet, event)], from: [event.clientX, event.clientY], far: false };
}

function move(event) {
  if (!drag || drag.sheet !== event.currentTarget) return;
  const [x, y] = [event.clientX - drag.from[0], event.clientY - drag.from[1]];
  drag.far = drag.far || Math.hypot(x, y) > CLICK;
  const point = place(drag.sheet, event);
  if (scribbling) drag.path.push(point);
  else drag.path[1] = point;
  const svg = drag.sheet.querySelector("svg");
  svg.querySelectorAll(".draft").forEach((node) => node.remove());
  if (drag.far) shape(add(svg, "g", { class: "draft" }, SVG), scribbling ? "scribble" : "box", around(drag.path), drag.path, "#222", {});
}

function around(path) {
  const [x, y] = [path.map((point) => point[0]), path.map((point) => point[1])];
  return [Math.min(...x), Math.min(...y), Math.max(...x), Math.max(...y)];
}

function end(event) {
  if (!drag) return;
  move(event);
  const { path, far } = drag;
  const step = Math.ceil(path.length / 400);
  if (!far) trigger("mark", { kind: "point", points: path.slice(0, 1) });
  else if (scribbling) trigger("mark", { kind: "scribble", points: path.filter((_, i) => i % step === 0 || i === path.length - 1) });
  else trigger("mark", { kind: "box", points: path });
  finish();
}

function finish() {
  element.querySelectorAll(".draft").forEach((node) => node.remove());
  drag = null;
}

pen.addEventListener("click", () => {
  scribbling = !scribbling;
  pen.setAttribute("aria-pressed", scribbling);
});

// A mark, its number and its words light up together, wherever the pointer or the focus is on one of them.
if (!window.openClocLinks) {
  window.openClocLinks = true;
  const lit = (event) => {
    const over = event.target.closest ? event.target.closest(".mark, .chip") : null;
    const name = over && [...over.classList].find((word) => /^n\d+$/.test(word));
    document.querySelectorAll(".mark, .chip").forEach((node) => node.classList.toggle("lit", !!name && node.classList.contains(name)));
  };
  for (const kind of ["mouseover", "focusin", "touchstart"]) document.addEventListener(kind, lit, { passive: true });
  // A picture that is pasted or dropped anywhere goes where an upload goes.
  const take = (event, files) => {
    const file = [...(files || [])].find((item) => item.type.startsWith("image/"));
    const input = document.querySelector("#picture input[type=file]");
    if (!file || !input || event.target.closest?.("#picture")) return;
    event.preventDefault();
    const list = new DataTransfer();
    list.items.add(file);
    input.files = list.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  document.addEventListener("paste", (event) => take(event, event.clipboardData?.files));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => take(event, event.dataTransfer?.files));
}

watch("value", draw);
draw();
