package dev.edgelab;

import java.io.IOException;
import java.util.Arrays;
import java.util.concurrent.locks.ReentrantLock;

/**
 * A language model of edgelab: an ONNX file with a key/value cache. Token ids in, logits or token ids out; {@link EdgeChat} is the same
 * with text.
 *
 * <p>Any thread may call; calls wait for each other. {@link #stop} and {@link #release} end a {@link #generate} that is under way, after
 * its current token. Nothing here is of Android: the same file runs on any JVM.
 */
public final class EdgeModel implements AutoCloseable {
  private final Handle handle;
  private final ReentrantLock lock; // the handle's
  private final int context;
  private final int vocabulary;
  private boolean generating;
  private volatile int stops;

  private EdgeModel(String path, int threads, int context) throws IOException {
    this.handle = Handle.open(this, path, threads, true);
    this.lock = handle.lock;
    this.context = context > 0 ? context : Integer.MAX_VALUE;
    this.vocabulary = (int) Native.vocabulary(handle.pointer());
  }

  /** {@link #load(String, int, int)} without a limit to the length of a text. */
  public static EdgeModel load(String path, int threads) throws IOException {
    return new EdgeModel(path, threads, 0);
  }

  /**
   * The model at {@code path}.
   *
   * @param threads as many as compute a token together; 0: the runtime's choice. Two is often best on a phone: the big cores.
   * @param context the longest text, in tokens, that the model was made for; 0: no limit
   * @throws java.io.FileNotFoundException when there is no such file
   * @throws EdgeException when it is no such model, or ONNX Runtime is not there
   */
  public static EdgeModel load(String path, int threads, int context) throws IOException {
    return new EdgeModel(path, threads, context);
  }

  /** The version of ONNX Runtime. */
  public static String runtimeVersion() {
    return Native.ready();
  }

  public int vocabulary() {
    return vocabulary;
  }

  /** The longest text in tokens. */
  public int context() {
    return context;
  }

  /** Logits [vocabulary] of the token after {@code ids}, which are read as a text of their own. */
  public float[] predict(long[] ids) {
    return read(ids, true, false);
  }

  /** {@link #predict(long[])} of ints. */
  public float[] predict(int[] ids) {
    long[] wide = new long[ids.length];
    for (int i = 0; i < ids.length; i++) wide[i] = ids[i];
    return predict(wide);
  }

  /** Logits [ids.length * vocabulary] after each token of {@code ids}, which are read as a text of their own. */
  public float[] predictAll(long[] ids) {
    return read(ids, true, true);
  }

  /** Logits [ids.length * vocabulary] after each token of {@code ids}, read on after what the last call left. */
  public float[] advance(long[] ids) {
    return read(ids, false, true);
  }

  /** Forgets what was read, so that the next {@link #advance} begins a text, and gives its memory back. */
  public void forget() {
    lock.lock();
    try {
      refuseInCallback();
      Native.forget(handle.pointer());
    } finally {
      lock.unlock();
    }
  }

  private float[] read(long[] ids, boolean fresh, boolean all) {
    lock.lock();
    try {
      refuseInCallback();
      long h = handle.pointer();
      checkLength((fresh ? 0 : Native.past(h)) + ids.length);
      if (fresh) Native.forget(h);
      return Native.feed(h, ids, null, 1, all);
    } finally {
      lock.unlock();
    }
  }

  /** Logits [prompts][vocabulary] of the token after each prompt, computed together; the shorter ones are padded at the left. */
  public float[][] predictBatch(long[][] prompts) {
    if (prompts.length == 0) throw new EdgeException(EdgeException.BAD_ARGUMENT, "no prompts are given");
    int rows = prompts.length, longest = 0;
    for (long[] p : prompts) {
      if (p.length == 0) throw new EdgeException(EdgeException.BAD_ARGUMENT, "no token ids are given; one at least is needed");
      longest = Math.max(longest, p.length);
    }
    long[] ids = new long[Math.multiplyExact(rows, longest)], mask = new long[ids.length];
    for (int r = 0; r < rows; r++) {
      int from = (r + 1) * longest - prompts[r].length;
      System.arraycopy(prompts[r], 0, ids, from, prompts[r].length);
      Arrays.fill(mask, from, (r + 1) * longest, 1);
    }
    lock.lock();
    try {
      refuseInCallback();
      long h = handle.pointer();
      checkLength(longest);
      Native.forget(h);
      float[] flat = Native.feed(h, ids, mask, rows, false);
      Native.forget(h); // the cache of a padded batch is nothing to go on with
      float[][] result = new float[rows][];
      for (int r = 0; r < rows; r++) result[r] = Arrays.copyOfRange(flat, r * vocabulary, (r + 1) * vocabulary);
      return result;
    } finally {
      lock.unlock();
    }
  }

  /** {@link #generate(long[], int, TokenChoice, TokenCallback)}, the likeliest token each time. */
  public long[] generate(long[] prompt, int maxNew, TokenCallback callback) {
    return generate(prompt, maxNew, null, callback);
  }

  /**
   * Up to {@code maxNew} tokens after {@code prompt}, one step of the cache each. It ends earlier when {@code callback} says so, at the
   * end of the context, and when another thread calls {@link #stop} or {@link #release}. Stop tokens are the caller's business, as in
   * {@code id -> id != end}.
   *
   * @param choice how a token is chosen; null: the likeliest, found without copying the logits to Java
   * @param callback told of each token, on this thread; it may not use this model. null: nobody is told
   * @return the new tokens
   */
  public long[] generate(long[] prompt, int maxNew, TokenChoice choice, TokenCallback callback) {
    if (maxNew < 0) throw new EdgeException(EdgeException.BAD_ARGUMENT, "maxNew=" + maxNew + " is below 0");
    int stopsAtCall = stops;
    lock.lock();
    try {
      refuseInCallback();
      checkLength(prompt.length);
      Native.forget(handle.pointer());
      generating = true;
      try {
        return steps(prompt, maxNew, choice, callback, stopsAtCall);
      } finally {
        generating = false;
      }
    } finally {
      lock.unlock();
    }
  }

  private long[] steps(long[] prompt, int maxNew, TokenChoice choice, TokenCallback callback, int stopsAtCall) {
    int limit = (int) Math.min(maxNew, (long) context - prompt.length + 1); // the last token is written, not read
    long[] written = new long[Math.min(limit, 64)];
    int count = 0;
    long[] step = prompt;
    while (count < limit && stops == stopsAtCall && !handle.isReleased()) {
      long h = handle.pointer();
      long id = choice == null ? Native.next(h, step) : choice.choose(Native.feed(h, step, null, 1, false));
      if (count == written.length) written = Arrays.copyOf(written, Math.min(limit, 2 * count));
      written[count++] = id;
      if (callback != null && !callback.onToken(id)) break;
      step = new long[] {id};
    }
    return Arrays.copyOf(written, count);
  }

  /** Ends a {@link #generate} that is under way, or waiting, in another thread. */
  public void stop() {
    stops++; // of two at once one may be lost: the count has changed all the same
  }

  /** Frees the model's memory; a second time does nothing. Later calls of other methods are refused. */
  public void release() {
    stop();
    handle.release();
  }

  /** {@link #release}. */
  @Override
  public void close() {
    release();
  }

  private void checkLength(long tokens) {
    if (tokens > context) {
      throw new EdgeException(EdgeException.BAD_ARGUMENT, "the text has " + tokens + " tokens; this model reads " + context + " at most");
    }
  }

  private void refuseInCallback() {
    if (generating) { // the lock lets the same thread in again: this is a callback
      throw new EdgeException(EdgeException.BAD_ARGUMENT, "a callback of generate may not use the model that calls it; return false first");
    }
  }
}
