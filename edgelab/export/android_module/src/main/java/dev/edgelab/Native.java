package dev.edgelab;

import java.nio.charset.StandardCharsets;

/** The functions of edge_jni.c. They trust their handle: {@link Handle} is the one that keeps it, and a lock, right. */
final class Native {
  private Native() {}

  private static String version;

  /**
   * Loads libedgelab and finds ONNX Runtime, once; returns the runtime's version. The system property {@code edgelab.onnxruntime}
   * names the runtime's library where it does not lie beside this one (on a desktop).
   */
  static synchronized String ready() {
    if (version != null) return version;
    try {
      System.loadLibrary("edgelab");
    } catch (UnsatisfiedLinkError e) {
      throw new EdgeException(EdgeException.NO_RUNTIME, "libedgelab is not among the app's libraries: " + e.getMessage());
    }
    String given = System.getProperty("edgelab.onnxruntime");
    String[] names = given != null ? new String[] {given} : new String[] {"libonnxruntime.so", "libonnxruntime.so.1"};
    EdgeException last = null;
    for (String name : names) {
      try {
        return version = start(name.getBytes(StandardCharsets.UTF_8));
      } catch (EdgeException e) {
        last = e;
      }
    }
    throw last;
  }

  /** Called by the C code: what to throw. */
  static Throwable failure(int code, byte[] utf8) {
    return new EdgeException(code, new String(utf8, StandardCharsets.UTF_8));
  }

  private static native String start(byte[] library);

  static native long open(byte[] path, int threads, boolean languageModel);

  static native void close(long handle);

  static native long vocabulary(long handle);

  static native long past(long handle);

  static native void forget(long handle);

  static native float[] feed(long handle, long[] ids, long[] mask, int rows, boolean all);

  static native long next(long handle, long[] ids);

  static native long[] inputShape(long handle);

  static native float[] run(long handle, float[] input, long[] shape);
}
