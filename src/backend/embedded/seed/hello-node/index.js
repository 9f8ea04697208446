// Example function: greets the person named in the payload. Reads the payload and prints one line of JSON.
"use strict";

const fs = require("node:fs");

// A payload that is too large for the environment is in a file.
const file = process.env.PAYLOAD_FILE;
const input = JSON.parse(file ? fs.readFileSync(file, "utf8") : (process.env.PAYLOAD ?? "{}"));
const named = typeof input === "object" && input !== null && typeof input.name === "string";
const name = named ? input.name : "world";
console.log(JSON.stringify({ message: `Hello, ${name}!`, input }));
