package dev.edgelab;

import java.io.File;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.lang.ref.PhantomReference;
import java.lang.ref.ReferenceQueue;
import java.nio.charset.StandardCharsets;
import java.util.Collections;
import java.util.HashSet;
import java.util.Set;
import java.util.concurrent.locks.ReentrantLock;

/**
 * A native session that is freed once: by {@link #release}, or when its owner was forgotten without it. ({@code java.lang.ref.Cleaner}
 * would do, but Android has it from API 33 on only.)
 */
final class Handle extends PhantomReference<Object> {
  private static final ReferenceQueue<Object> FORGOTTEN = new ReferenceQueue<>();
  private static final Set<Handle> HELD = Collections.synchronizedSet(new HashSet<Handle>());
  private static Thread reaper;

  /** Held by whoever uses the session, so that nobody frees it meanwhile: not another thread, and not the reaper. */
  final ReentrantLock lock = new ReentrantLock();

  private long pointer;

  private Handle(Object owner, long pointer) {
    super(owner, FORGOTTEN);
    this.pointer = pointer;
    HELD.add(this);
  }

  static Handle open(Object owner, String path, int threads, boolean languageModel) throws IOException {
    if (path == null || path.indexOf('\0') >= 0 || !new File(path).isFile()) {
      throw new FileNotFoundException("there is no model file at " + path);
    }
    Native.ready();
    startReaper();
    return new Handle(owner, Native.open(path.getBytes(StandardCharsets.UTF_8), threads, languageModel));
  }

  /** The native address; call it, and use the answer, under {@link #lock} only. */
  long pointer() {
    if (pointer == 0) throw new EdgeException(EdgeException.RELEASED, "the model was released; load it again");
    return pointer;
  }

  boolean isReleased() {
    return pointer == 0;
  }

  /** A second time does nothing. */
  void release() {
    lock.lock();
    try {
      long old = pointer;
      pointer = 0;
      HELD.remove(this);
      clear();
      if (old != 0) Native.close(old);
    } finally {
      lock.unlock();
    }
  }

  private static synchronized void startReaper() {
    if (reaper != null) return;
    reaper = new Thread(Handle::reap, "edgelab-reaper");
    reaper.setDaemon(true);
    reaper.start();
  }

  private static void reap() {
    while (true) {
      try {
        ((Handle) FORGOTTEN.remove()).release();
      } catch (InterruptedException e) {
        // nobody interrupts it on purpose: go on
      }
    }
  }
}
