// The part of regl-scatterplot that owns the WebGL context, for one map.
//
// The library's own renderer draws with multisampling into a frame buffer of 32-bit numbers, converts that on a second
// pass and copies the result to a 2D canvas: with WebGL in software, 180 ms per frame of 0.8 megapixels. This one draws
// directly to the canvas that is shown.

import createRegl from 'regl';

const UNMASKED_RENDERER = 0x9246; // of WEBGL_debug_renderer_info
// The attribute failIfMajorPerformanceCaveat does not notice SwiftShader if Chromium is started with it.
const SOFTWARE = /swiftshader|llvmpipe|softpipe|software|basic render/i;
const EMPTY = { color: [0, 0, 0, 0], depth: 1 };

/** Throws if the browser has no WebGL, or none with textures of floating-point numbers; `software`: even without a GPU. */
export function directRenderer(canvas, software) {
  const gl = canvas.getContext('webgl', { antialias: false, depth: false, stencil: false });
  if (!gl) throw new Error('no WebGL');
  const name = gl.getExtension('WEBGL_debug_renderer_info') && gl.getParameter(UNMASKED_RENDERER);
  if (!software && SOFTWARE.test(name ?? '')) throw new Error(`WebGL without a GPU: ${name}`);
  const regl = createRegl({
    gl, extensions: ['OES_texture_float', 'OES_element_index_uint'], optionalExtensions: ['WEBGL_color_buffer_float', 'EXT_float_blend'],
  });
  const drawing = new Set();
  const frame = regl.frame(() => drawing.forEach((draw) => draw()));
  const renderer = {
    canvas, regl, gamma: 1, isSupported: true, isDestroyed: false,
    render(draw) {
      regl.clear(EMPTY);
      draw();
    },
    onFrame(draw) {
      drawing.add(draw);
      return () => drawing.delete(draw);
    },
    refresh: () => regl.poll(),
    resize() {}, // regl-scatterplot sets the size of the canvas
    destroy() {
      renderer.isDestroyed = true;
      frame.cancel();
      regl.destroy();
    },
  };
  return renderer;
}
