package dev.edgelab;

import java.io.IOException;
import java.util.Objects;
import java.util.concurrent.locks.ReentrantLock;

/** Any ONNX net with one float input: an image classifier, a regression. Numbers in, the first output's numbers out. */
public final class EdgeNet implements AutoCloseable {
  private final Handle handle;
  private final ReentrantLock lock; // the handle's

  private EdgeNet(String path, int threads) throws IOException {
    this.handle = Handle.open(this, path, threads, false);
    this.lock = handle.lock;
    try {
      Native.inputShape(handle.pointer());
    } catch (RuntimeException e) {
      handle.release();
      throw e;
    }
  }

  /** The net at {@code path}; see {@link EdgeModel#load(String, int, int)}. */
  public static EdgeNet load(String path, int threads) throws IOException {
    return new EdgeNet(path, threads);
  }

  /** The input's sizes as the file states them; -1 where any will do. */
  public long[] inputShape() {
    lock.lock();
    try {
      return Native.inputShape(handle.pointer());
    } finally {
      lock.unlock();
    }
  }

  /** The first output for {@code input} (row-major), whose shape is the file's; one size may be open, it follows from the length. */
  public float[] predict(float[] input) {
    Objects.requireNonNull(input, "input");
    lock.lock();
    try {
      long[] shape = Native.inputShape(handle.pointer());
      long known = 1;
      int open = -1;
      for (int i = 0; i < shape.length; i++) {
        if (shape[i] > 0) known *= shape[i];
        else if (open < 0) open = i;
        else throw new EdgeException(EdgeException.BAD_ARGUMENT, "the input has several open sizes; give the shape");
      }
      if (open >= 0) shape[open] = input.length / known;
      return Native.run(handle.pointer(), input, shape);
    } finally {
      lock.unlock();
    }
  }

  /** The first output for {@code input} (row-major) of this shape. */
  public float[] predict(float[] input, long... shape) {
    if (shape.length == 0) return predict(input);
    Objects.requireNonNull(input, "input");
    lock.lock();
    try {
      return Native.run(handle.pointer(), input, shape);
    } finally {
      lock.unlock();
    }
  }

  /** Frees the net's memory; a second time does nothing. */
  public void release() {
    handle.release();
  }

  /** {@link #release}. */
  @Override
  public void close() {
    release();
  }
}
