// The search of a site that is opened from a directory: browsers start no worker there, so its
// script runs in a hidden frame. The theme asks for this under the name `Worker`.
class FrameWorker extends EventTarget {
  constructor(script) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    this.inside = frame.contentWindow;
    this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
    const element = this.inside.document.createElement("script");
    this.ready = new Promise((done) => element.addEventListener("load", done));
    element.src = script;
    this.inside.document.body.append(element);
  }

  async postMessage(data) {
    await this.ready;
    this.inside.dispatchEvent(new MessageEvent("message", { data }));
  }
}
if (location.protocol === "file:") window.Worker = FrameWorker;
