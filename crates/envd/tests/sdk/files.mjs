// Files through the published JavaScript SDK (npm e2b 2.45.0 and 2.51.0), which talks to one envd on this machine.
//
//     envd --standalone --port 49983 &
//     E2B_DEBUG=true E2B_API_KEY=e2b_00 node files.mjs
//
// Exits with an error at the first thing that is not as it should be.

import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { FileNotFoundError, InvalidArgumentError, Sandbox } from 'e2b'

assert.equal(process.env.E2B_DEBUG, 'true', 'this script must not reach any real sandbox')

/** Waits for a condition. */
async function until(what, isSo) {
  for (const end = Date.now() + 10_000; !isSo(); ) {
    assert(Date.now() < end, `not in time: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
}

async function writeAndRead(files, root) {
  const info = await files.write(`${root}/a/f.txt`, 'hällo', { metadata: { Author: 'me' } })
  assert.deepEqual([info.path, info.name, info.type], [`${root}/a/f.txt`, 'f.txt', 'file'])
  assert.equal(await files.read(info.path), 'hällo')
  assert.equal(await new Response(await files.read(info.path, { format: 'stream' })).text(), 'hällo')
  assert.deepEqual((await files.getInfo(info.path)).metadata, { author: 'me' })
  await files.write(`${root}/empty`, '')
  assert.equal(await files.read(`${root}/empty`), '')
  const names = ['with space', '"quoted"', 'percent%20', 'ümläut', 'dir/below']
  await files.write(names.map((name) => ({ path: `${root}/many/${name}`, data: name })))
  for (const name of names) assert.equal(await files.read(`${root}/many/${name}`), name)
  const big = new Uint8Array(3_000_000).map((_, n) => (n * 2654435761) >>> 24)
  await files.write(`${root}/big`, new Blob([big]))
  assert.deepEqual(await files.read(`${root}/big`, { format: 'bytes' }), big)
  await assert.rejects(files.read(`${root}/none`), FileNotFoundError)
  await assert.rejects(files.write(`${root}/many`, 'a directory'), InvalidArgumentError)
}

async function directories(files, root) {
  assert.equal(await files.makeDir(`${root}/d/e`), true)
  assert.equal(await files.makeDir(`${root}/d/e`), false)
  await files.write(`${root}/d/f`, '12345')
  const listed = await files.list(`${root}/d`)
  assert.deepEqual(listed.map((entry) => [entry.path, entry.type]), [[`${root}/d/e`, 'dir'], [`${root}/d/f`, 'file']])
  await files.rename(`${root}/d/f`, `${root}/moved/g`)
  assert.equal(await files.exists(`${root}/d/f`), false)
  await files.remove(`${root}/moved`)
  assert.equal(await files.exists(`${root}/moved`), false)
  for (const path of ['', '/', '.', '~']) await assert.rejects(files.remove(path), InvalidArgumentError)
}

async function watch(files, root) {
  await files.makeDir(`${root}/watched`)
  const seen = []
  const note = (event) => seen.push(`${event.type} ${event.name} ${event.entry?.size ?? ''}`.trim())
  const handle = await files.watchDir(`${root}/watched`, note, { recursive: true, includeEntry: true })
  await files.write(`${root}/watched/f`, 'x')
  await until('three events', () => seen.length >= 3)
  assert.deepEqual(seen, ['create f 1', 'chmod f 1', 'write f 1'])
  await files.write(`${root}/watched/deep/er/f`, '12345')
  await until('the nested file', () => seen.includes('write deep/er/f 5'))
  await handle.stop()
  await assert.rejects(files.watchDir(`${root}/none`, note), FileNotFoundError)
}

const root = mkdtempSync(join(tmpdir(), 'envd-sdk-'))
try {
  const { files } = await Sandbox.create()
  for (const check of [writeAndRead, directories, watch]) {
    await check(files, root)
    console.log(`${check.name}: right`)
  }
} finally {
  rmSync(root, { recursive: true })
}
// The SDK keeps connections that would hold the process for a while.
process.exitCode ??= 0
setTimeout(() => process.exit(), 100).unref()
