// Runs one job of the native kernel as WebAssembly:  node runner.mjs MODULE JOB OUTPUT
//
// The format of JOB is `write_job` of conftest.py, that of OUTPUT the one of runner.cpp. Prints the time of the inverse
// in milliseconds.
import { readFileSync, writeFileSync } from "node:fs";

const [, , modulePath, jobPath, outputPath] = process.argv;
const { instance } = await WebAssembly.instantiate(readFileSync(modulePath), {});
const native = instance.exports;
const job = readFileSync(jobPath);
let at = 0;
let end = Number(native.__heap_base.value);

function integer() {
  at += 8;
  return Number(job.readBigInt64LE(at - 8));
}
function bytes() {
  const size = integer();
  at += size;
  return job.subarray(at - size, at);
}

// Room in the module's memory, at a multiple of 64 bytes; memory only grows.
function room(size) {
  const start = Math.ceil(end / 64) * 64;
  end = start + size;
  const missing = end - native.memory.buffer.byteLength;
  if (missing > 0) native.memory.grow(Math.ceil(missing / 65536));
  return start;
}
function put(data) {
  const start = room(data.length);
  new Uint8Array(native.memory.buffer).set(data, start);
  return start;
}
const text = (data) => put(Buffer.concat([data, Buffer.from([0])]));
const int64s = (values) => Buffer.from(BigInt64Array.from(values.map(BigInt)).buffer);

function require(status, what) {
  if (status !== 0) throw new Error(`${what}: status ${status}`);
}

const shape = put(int64s(Array.from({ length: 7 }, integer)));
const [batch, branches, steps, count] = Array.from({ length: 4 }, integer);
const precision = text(bytes());
const table = Buffer.alloc(32 * count); // name, dtype, shape: 4 bytes each, 4 of padding; rank, offset: 8
for (let i = 0; i < count; ++i) {
  const [name, dtype, axes] = [text(bytes()), text(bytes()), bytes()];
  table.writeUInt32LE(name, 32 * i);
  table.writeUInt32LE(dtype, 32 * i + 4);
  table.writeUInt32LE(put(axes), 32 * i + 8);
  table.writeBigInt64LE(BigInt(axes.length / 8), 32 * i + 16);
  table.writeBigInt64LE(BigInt(integer()), 32 * i + 24);
}
const tensors = put(table);
const weights = bytes();
const packedBytes = native.tarflow_native_packed_bytes(shape, precision);
const packed = room(packedBytes);
const file = put(weights);
require(
  native.tarflow_native_pack(shape, precision, tensors, BigInt(count), file, weights.length, packed, packedBytes, 0),
  "pack",
);

const noise = bytes();
const [given, labels, guidance, inverseTemperature] = [put(noise), ...[0, 0, 0].map(() => {
  const data = bytes();
  return data.length ? put(data) : 0;
})];
const x = room(noise.length);
const workspaceBytes = native.tarflow_native_workspace_bytes(shape, BigInt(batch), BigInt(branches), 1n);
const workspace = room(workspaceBytes);

const run = Buffer.alloc(88);
const words = [[0, 88], [4, packed], [8, packedBytes], [52, given], [56, x], [60, labels], [64, guidance],
  [68, inverseTemperature], [72, workspace], [76, workspaceBytes]];
for (const [offset, value] of words) run.writeUInt32LE(value, offset);
[batch, branches, steps, 1].forEach((value, i) => run.writeBigInt64LE(BigInt(value), 16 + 8 * i));
const start = performance.now();
require(native.tarflow_native_invert(put(run)), "invert");
console.log((performance.now() - start).toFixed(3));

const z = room(noise.length);
const logDet = room(8 * batch);
const forwardBytes = native.tarflow_native_forward_bytes(shape, BigInt(batch), 1n);
const forwardWorkspace = room(forwardBytes);
const pass = Buffer.alloc(72);
const fields = [[0, 72], [4, packed], [8, packedBytes], [36, x], [40, z], [44, logDet], [48, labels],
  [52, forwardWorkspace], [56, forwardBytes]];
for (const [offset, value] of fields) pass.writeUInt32LE(value, offset);
[batch, 1].forEach((value, i) => pass.writeBigInt64LE(BigInt(value), 16 + 8 * i));
require(native.tarflow_native_forward(put(pass)), "forward");
const made = [[x, noise.length], [z, noise.length], [logDet, 8 * batch]];
writeFileSync(outputPath, Buffer.concat(made.map(([start, size]) => Buffer.from(native.memory.buffer, start, size))));
