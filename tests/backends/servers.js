// Backends of node: `node servers.js NAME PORT`. Those of packages find them through NODE_PATH.
"use strict";
const http = require("node:http");
const PATHS = ["/api/v1/recovery/execute", "/recovery/execute"];

function executed(headers, body) {
  let facts = null;
  try {
    facts = JSON.parse(body);
  } catch {}
  if (typeof facts !== "object" || facts === null) facts = {};
  const report = { case: headers["x-case"] ?? null, decision_id: headers["scopegate-decision-id"] ?? null, facts };
  console.log("EXECUTED " + JSON.stringify(report));
}

// A plain server that takes the path out of each request in a way of its own.
function plain(pathOf) {
  return (port) =>
    http
      .createServer((request, response) => {
        const pieces = [];
        request.on("data", (piece) => pieces.push(piece));
        request.on("end", () => {
          let path = null;
          try {
            path = pathOf(request);
          } catch {}
          const found = request.method === "POST" && PATHS.includes(path);
          if (found) executed(request.headers, Buffer.concat(pieces).toString());
          response.writeHead(found ? 200 : 404).end();
        });
      })
      .listen(port, "127.0.0.1");
}

function express(name) {
  return (port) => {
    const package_ = require(name);
    const app = package_();
    app.set("trust proxy", true);
    app.use(package_.text({ type: () => true }));
    app.post(PATHS, (request, response) => {
      executed(request.headers, request.body);
      response.end();
    });
    app.listen(port, "127.0.0.1");
  };
}

const servers = {
  // new URL resolves dot segments, takes \ for / and drops tab, CR and LF.
  "node-url": plain((request) => new URL(request.url, `http://${request.headers.host}`).pathname),
  "node-decoded-url": plain((request) => new URL(decodeURIComponent(request.url), "http://backend").pathname),
  "node-host-url": plain((request) => new URL(`http://${request.headers.host}${request.url}`).pathname),
  "node-unescape": plain((request) => unescape(request.url.split("?")[0]).trim().toLowerCase()),
  express4: express("express4"),
  express5: express("express"),
  fastify: (port) => {
    const app = require("fastify")({
      routerOptions: { caseSensitive: false, ignoreTrailingSlash: true, ignoreDuplicateSlashes: true, useSemicolonDelimiter: true },
    });
    app.addContentTypeParser("*", { parseAs: "string" }, (request, body, done) => done(null, body));
    app.removeContentTypeParser("application/json");
    for (const path of PATHS) {
      app.post(path, async (request) => {
        executed(request.headers, request.body);
        return "executed";
      });
    }
    app.listen({ port, host: "127.0.0.1" });
  },
};
servers[process.argv[2]](Number(process.argv[3]));
