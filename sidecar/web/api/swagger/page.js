"use strict";

// The page may call its own listener only, so only what is served there can be tried out.
const tryWhatIsHere = () => ({
  statePlugins: {
    spec: {
      wrapSelectors: {
        allowTryItOutFor: (original, system) => (state, path) =>
          system.specSelectors.specJson().getIn(["paths", path, "servers", 0, "url"]) === "/",
      },
    },
  },
});

SwaggerUIBundle({
  url: "/openapi.json",
  domNode: document.getElementById("page"),
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  plugins: [tryWhatIsHere],
});
