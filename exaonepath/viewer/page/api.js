// Requests to the server that this page came from. Addresses are relative, so that they carry the token.

export class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(0, "The viewer does not answer: was the command ended?");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new RequestError(response.status, body.error || response.statusText);
  }
  return response;
}

const query = (values) => {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined);
  return given.length ? `?${new URLSearchParams(given)}` : "";
};

export async function json(path, values = {}, options = undefined) {
  return (await request(`api/${path}${query(values)}`, options)).json();
}

/** An array of a slide: `{values, headers}`. */
export async function array(slide, name, type, values = {}, options = undefined) {
  const response = await request(`api/slides/${slide.key}/${name}${query({ v: slide.version, ...values })}`, options);
  return { values: new type(await response.arrayBuffer()), headers: response.headers };
}

export function put(path, body) {
  return json(path, {}, { method: "PUT", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
}
