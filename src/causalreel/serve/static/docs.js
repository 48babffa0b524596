// The routes of openapi.json with what they take and answer, each to be tried. Asks this server and nobody else.

import { $, stored, tell } from "./page.js";

const base = new URL(".", document.baseURI);
let token = stored(() => sessionStorage, "token") ?? "";
let schemas = {};

function make(name, text = "", more = {}) {
  const element = Object.assign(document.createElement(name), more);
  element.textContent = text;
  return element;
}

function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  return fetch(new URL(path, base), { ...options, headers, cache: "no-store" });
}

/** A schema that is meant, behind a reference. */
const meant = (schema) => (schema?.$ref ? schemas[schema.$ref.split("/").pop()] : schema) ?? {};

/** The type of a value, in a few words. */
function type(schema) {
  if (schema.$ref) return type(meant(schema));
  if (schema.anyOf || schema.oneOf) return (schema.anyOf ?? schema.oneOf).map(type).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  const least = schema.minimum ?? schema.exclusiveMinimum, most = schema.maximum ?? schema.exclusiveMaximum;
  const range = least === undefined && most === undefined ? "" : ` ${least ?? ""}..${most ?? ""}`;
  return `${schema.type ?? "any"}${range}`;
}

function table(rows) {
  const element = make("table");
  for (const cells of rows) {
    const row = element.insertRow();
    cells.forEach((cell, at) => row.append(make(at ? "td" : "th", cell)));
  }
  return element;
}

/** Name, type and meaning of each field of an object. */
function fields(schema) {
  const needed = schema.required ?? [];
  const about = (field) => field.description ?? (field.default === undefined ? "" : `default ${JSON.stringify(field.default)}`);
  return Object.entries(schema.properties ?? {}).map(([name, field]) => (
    [name + (needed.includes(name) ? " *" : ""), type(field), about(field)]));
}

/** A body to begin with: what must be given. */
function example(schema) {
  const first = meant(schema.oneOf?.[0] ?? schema), value = {};
  for (const name of first.required ?? []) {
    const field = meant(first.properties[name]);
    value[name] = field.const ?? field.enum?.[0] ?? (field.type === "string" ? "a large red circle moves right" : 1);
  }
  return JSON.stringify(value, null, 1);
}

function body(content) {
  const schema = meant(content["application/json"]?.schema);
  const parts = (schema.oneOf ?? schema.anyOf ?? [schema]).map(meant);
  return { example: example(schema), tables: parts.flatMap((part) => [make("p", part.description ?? ""), table(fields(part))]) };
}

/** What is given for a route, and its answer. */
function trial(method, path, given, text) {
  const form = make("form", "", { className: "try" }), inputs = new Map();
  for (const parameter of given) {
    const label = make("label", `${parameter.name} `), input = make("input", "", { required: parameter.required });
    inputs.set(parameter, input);
    label.append(input);
    form.append(label);
  }
  const area = text === null ? null : make("textarea", text, { spellcheck: false, ariaLabel: "JSON body" });
  const answer = make("pre", "", { hidden: true });
  form.append(...(area ? [area] : []), make("button", `Try ${method}`), answer);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    answer.hidden = false;
    const query = new URLSearchParams();
    let place = path;
    for (const [{ name, in: where }, { value }] of inputs) {
      if (where === "path") place = place.replace(`{${name}}`, encodeURIComponent(value));
      else if (value) query.set(name, value);
    }
    const headers = area ? { "Content-Type": "application/json" } : {};
    try {
      const got = await ask(place.slice(1) + (query.size ? `?${query}` : ""), { method, headers, body: area?.value });
      const kind = got.headers.get("content-type") ?? "", isText = /json|text/.test(kind);
      const shown = isText ? await got.text() : `${(await got.blob()).size} bytes of ${kind}`;
      answer.textContent = `${got.status}\n${kind.includes("json") ? JSON.stringify(JSON.parse(shown), null, 1) : shown}`;
    } catch (error) {
      answer.textContent = `No answer: ${error.message}`;
    }
  });
  return form;
}

function route(path, method, about) {
  const element = make("details", "", { className: "card" }), summary = make("summary");
  summary.append(make("span", method.toUpperCase(), { className: "method" }), make("code", path));
  summary.append(make("span", about.summary ?? "", { className: "about" }));
  element.append(summary, make("p", about.description ?? ""));
  const given = about.parameters ?? [];
  if (given.length) element.append(table(given.map((p) => [p.name, type(p.schema), p.description ?? p.schema.description ?? ""])));
  const takes = about.requestBody ? body(about.requestBody.content) : null;
  if (takes) element.append(...takes.tables);
  element.append(table(Object.entries(about.responses).map(([status, { description }]) => [status, description])));
  element.append(trial(method.toUpperCase(), path, given, takes?.example ?? null));
  return element;
}

async function show() {
  const answer = await ask("openapi.json");
  $("access").hidden = answer.status !== 401;
  if (answer.status === 401 && token) tell("The server did not take this token.");
  if (!answer.ok) return;
  tell("");
  const document = await answer.json(), rooms = new Map();
  schemas = document.components.schemas;
  for (const [path, methods] of Object.entries(document.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      const tag = about.tags?.[0] ?? "other";
      if (!rooms.has(tag)) rooms.set(tag, [make("h2", tag)]);
      rooms.get(tag).push(route(path, method, about));
    }
  }
  $("routes").replaceChildren(...[...rooms.values()].flat());
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  stored(() => sessionStorage, "token", token);
  show();
});

show().catch((error) => tell(`The description cannot be read: ${error.message}`));
