// Swagger UI of the API. All addresses are relative: the service may be served below a path of a proxy.

const response = await fetch("openapi.json");
const spec = await response.json();
spec.servers = [{ url: new URL(".", document.baseURI).href.replace(/\/$/, "") }];

SwaggerUIBundle({
  spec,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // no badge of a foreign host
});
