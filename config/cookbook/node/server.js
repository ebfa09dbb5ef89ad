// A recovery backend on Node's own http module. It does not know scopes, and executes what the gate forwards.
'use strict';

const http = require('node:http');

const executed = []; // keep yours in a database, with the decision id as its unique key

function send(response, status, body, headers = {}) {
  const text = JSON.stringify(body);
  response.writeHead(status, {
    'Content-Type': 'application/json',
    'Content-Length': Buffer.byteLength(text),
    ...headers,
  });
  response.end(text);
}

async function execute(request, response) {
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  let asked;
  try {
    asked = JSON.parse(Buffer.concat(pieces).toString('utf8'));
  } catch {
    return send(response, 400, { error: 'not JSON' }); // only a shadow route forwards such a body
  }
  // Node has header names in lower case. In shadow mode a request without a scope has a decision id, but no
  // Scopegate-Scope-Id and no Scopegate-Attempt-Number.
  executed.push({
    decision: request.headers['scopegate-decision-id'],
    scope: request.headers['scopegate-scope-id'] ?? null,
    action: asked.action,
  });
  // ... here the agent is retried ...
  // The real cost, in dollars. Without this header the action's max_cost_usd counts as spent.
  return send(response, 200, { done: asked.action }, { 'X-Recovery-Cost-USD': '0.02' });
}

const server = http.createServer((request, response) => {
  const path = request.url.split('?')[0];
  if (request.method === 'POST' && path === '/api/v1/recovery/execute') {
    execute(request, response).catch(() => response.destroy()); // the client left before its body was complete
  } else if (request.method === 'GET' && path === '/api/v1/executed') {
    send(response, 200, { executed });
  } else {
    send(response, 404, { error: 'no such path' });
  }
});

server.keepAliveTimeout = 5_000; // Node's default; keep upstream.reuse_idle_seconds of the gate below it
server.listen(Number(process.env.BACKEND_PORT ?? 9000), '127.0.0.1');

for (const signal of ['SIGINT', 'SIGTERM']) {
  process.on(signal, () => server.close()); // requests in flight still get their answers
}
