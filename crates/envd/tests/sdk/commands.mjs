// Commands and terminals through the published JavaScript SDK (npm e2b 2.45.0 and 2.51.0), which talks to one envd on this machine.
//
//     envd --standalone --port 49983 &
//     E2B_DEBUG=true E2B_API_KEY=e2b_00 node commands.mjs
//
// Exits with an error at the first thing that is not as it should be.

import assert from 'node:assert/strict'
import { CommandExitError, NotFoundError, Sandbox, SandboxError, TimeoutError } from 'e2b'

assert.equal(process.env.E2B_DEBUG, 'true', 'this script must not reach any real sandbox')

/** Waits for a condition. */
async function until(what, isSo) {
  for (const end = Date.now() + 10_000; !(await isSo()); ) {
    assert(Date.now() < end, `not in time: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
}

async function fails(kind, promise) {
  const error = await promise.then(() => assert.fail(`no ${kind.name}`), (error) => error)
  assert(error instanceof kind, error)
  return error
}

async function foreground({ commands }) {
  let result = await commands.run('echo out; echo err >&2')
  assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n', 'err\n', 0])
  const failed = await fails(CommandExitError, commands.run('echo out; echo err >&2; exit 7'))
  assert.deepEqual([failed.stdout, failed.stderr, failed.exitCode], ['out\n', 'err\n', 7])
  // Characters of several bytes come whole, wherever the pieces of the output are cut.
  result = await commands.run(`python3 -c 'print("äöü€😀" * 50000)'`)
  assert.equal(result.stdout, 'äöü€😀'.repeat(50000) + '\n')
  let heard = ''
  result = await commands.run('seq 1 20000', { onStdout: (piece) => { heard += piece } })
  assert.equal(result.stdout, Array.from({ length: 20000 }, (_, n) => `${n + 1}\n`).join(''))
  assert.equal(heard, result.stdout)
  const many = await Promise.all(Array.from({ length: 30 }, (_, n) => commands.run(`echo ${n}`)))
  assert.deepEqual(many.map((it) => it.stdout), many.map((_, n) => `${n}\n`))
}

async function surroundings({ commands }) {
  assert.equal((await commands.run('echo $A-$B', { envs: { A: 'one', B: 'tw o' } })).stdout, 'one-tw o\n')
  assert.equal((await commands.run('pwd', { cwd: '/usr/lib' })).stdout, '/usr/lib\n')
  await fails(SandboxError, commands.run('pwd', { cwd: '/no/such/place' }))
  assert.equal((await commands.run('id -un', { user: 'nobody' })).stdout, 'nobody\n')
  await assert.rejects(commands.run('id', { user: 'no-such-user' }))
}

async function background({ commands }) {
  const handle = await commands.run('read line; echo got $line; cat; exit 3', { background: true, stdin: true })
  assert((await commands.list()).some((it) => it.pid === handle.pid && it.cmd === '/bin/bash'))
  await commands.sendStdin(handle.pid, 'hällo\n')
  await commands.sendStdin(handle.pid, 'rest')
  await commands.closeStdin(handle.pid)
  const failed = await fails(CommandExitError, handle.wait())
  assert.deepEqual([failed.stdout, failed.exitCode], ['got hällo\nrest', 3])
  await fails(NotFoundError, commands.sendStdin(handle.pid, 'too late'))
}

async function kill({ commands }) {
  const handle = await commands.run('sleep 1000', { background: true })
  const ending = fails(CommandExitError, handle.wait())
  assert.equal(await commands.kill(handle.pid), true)
  assert.match((await ending).error, /killed/)
  assert.equal(await commands.kill(handle.pid), false)
}

async function connect({ commands }) {
  const handle = await commands.run('read line; echo got $line; exit 5', { background: true, stdin: true })
  await handle.disconnect()
  const again = await commands.connect(handle.pid)
  const ending = fails(CommandExitError, again.wait())
  await commands.sendStdin(handle.pid, 'x\n')
  const failed = await ending
  assert.deepEqual([again.pid, failed.stdout, failed.exitCode], [handle.pid, 'got x\n', 5])
  await fails(NotFoundError, commands.connect(4_000_000))
}

async function timeout({ commands }) {
  await fails(TimeoutError, commands.run('sleep 1000', { timeoutMs: 500 }))
  await until('nothing runs', async () => (await commands.list()).length === 0)
  assert.equal((await commands.run('echo fine', { timeoutMs: 0 })).stdout, 'fine\n')
}

async function terminal({ pty }) {
  let screen = ''
  const decoder = new TextDecoder()
  const onData = (data) => { screen += decoder.decode(data, { stream: true }) }
  const type = (handle, text) => pty.sendInput(handle.pid, new TextEncoder().encode(text))
  const handle = await pty.create({ rows: 30, cols: 100, envs: { OWN: 'va lue' }, cwd: '/usr', onData })
  const ending = fails(CommandExitError, handle.wait())
  // The echo of a line must not be taken for its answer: what is waited for stands in none of the lines.
  await type(handle, 'echo [$(stty size)] $TERM $OWN $PWD. $((40+2))\n')
  await until('the size', () => screen.includes('[30 100] xterm-256color va lue /usr. 42\r\n'))
  await pty.resize(handle.pid, { rows: 5, cols: 70 })
  await type(handle, 'echo [$(stty size)]\n')
  await until('the new size', () => screen.includes('[5 70]\r\n'))
  await type(handle, 'echo hällo$((1+1)); exit 3\n')
  assert.equal((await ending).exitCode, 3)
  assert(screen.includes('hällo2\r\n'), screen)

  const other = await pty.create({ rows: 24, cols: 80, onData })
  await other.disconnect()
  screen = ''
  const again = await pty.connect(other.pid, { onData })
  const killed = fails(CommandExitError, again.wait())
  await type(again, 'echo $((6*7)).\n')
  await until('the answer', () => screen.includes('42.\r\n'))
  assert.equal(await pty.kill(other.pid), true)
  await killed
  assert.equal(await pty.kill(other.pid), false)
}

const sandbox = await Sandbox.create()
for (const check of [foreground, surroundings, background, kill, connect, timeout, terminal]) {
  await check(sandbox)
  console.log(`${check.name}: right`)
}
// The SDK keeps connections that would hold the process for a while.
process.exitCode ??= 0
setTimeout(() => process.exit(), 100).unref()
