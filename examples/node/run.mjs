// One mixed batch of a whole model's graph in onnxruntime-node, and what each adapter changes.
//
//     npm install --prefix examples/node --ignore-scripts
//     node examples/node/run.mjs artifacts/minilm
//
// onnxruntime-node ignores in silence what is fed to a stack, so that the adapters are those that the
// build loaded. The graph does not check slot numbers; `slotNumbers` does.

import fs from "node:fs";
import path from "node:path";
import ort from "onnxruntime-node";

/** A name for each row (null is the base) -> int64 slot numbers, all from 0 to numSlots. */
export function slotNumbers(names, manifest) {
  const slots = new Map([[null, 0]]);
  for (const adapter of manifest.adapters) {
    if (adapter.slot !== null) slots.set(adapter.name, adapter.slot);
  }
  return BigInt64Array.from(names, (name, row) => {
    const slot = slots.get(name);
    if (slot === undefined) {
      throw new RangeError(`row ${row}: no adapter '${name}' in a slot; there are ${[...slots.keys()]}`);
    }
    return BigInt(checkSlot(slot, manifest.num_slots));
  });
}

/** A negative slot would count from the end and run another tenant's adapter. */
export function checkSlot(slot, numSlots) {
  if (!Number.isInteger(slot) || slot < 0 || slot > numSlots) {
    throw new RangeError(`slot ${slot}; expected 0 to ${numSlots}`);
  }
  return slot;
}

async function main(artifact) {
  const manifest = JSON.parse(fs.readFileSync(path.join(artifact, "manifest.json"), "utf8"));
  const session = await ort.InferenceSession.create(path.join(artifact, "graphs", "model.onnx"), {
    logSeverityLevel: 3, // it warns that the stacks may be overridden, as they should
  });
  const names = [...manifest.adapters.filter((a) => a.slot !== null).map((a) => a.name), null];

  // The same five tokens in every row: what differs is the adapter. A tokenizer would give them.
  const tokens = [101, 7592, 2088, 999, 102].map(BigInt);
  const dims = [names.length, tokens.length];
  const fill = (values) => new ort.Tensor("int64", BigInt64Array.from(names.flatMap(() => values)), dims);
  const values = {
    input_ids: () => fill(tokens),
    attention_mask: () => fill(tokens.map(() => 1n)),
    token_type_ids: () => fill(tokens.map(() => 0n)),
  };
  const feeds = {};
  for (const name of session.inputNames) if (name in values) feeds[name] = values[name]();
  const run = async (rows) => {
    const ids = new ort.Tensor("int64", slotNumbers(rows, manifest), [rows.length]);
    const out = await session.run({ ...feeds, adapter_ids: ids });
    return out[session.outputNames[0]];
  };

  const mixed = await run(names);
  const base = await run(names.map(() => null));
  const width = mixed.data.length / names.length;
  console.log(`${artifact}: ${session.outputNames[0]} [${mixed.dims}], one batch of ${names.length} rows`);
  names.forEach((name, row) => {
    let change = 0;
    let size = 0;
    for (let i = row * width; i < (row + 1) * width; i++) {
      change += (mixed.data[i] - base.data[i]) ** 2;
      size += base.data[i] ** 2;
    }
    const share = (100 * Math.sqrt(change / size)).toFixed(2).padStart(6);
    console.log(`  ${(name ?? "base").padEnd(10)} row ${row} moved: ${share} %`);
  });
}

if (process.argv[1] && import.meta.url.endsWith(path.basename(process.argv[1]))) {
  if (process.argv.length !== 3) {
    console.error("node examples/node/run.mjs ARTIFACT");
    process.exit(2);
  }
  await main(process.argv[2]);
}
