package dev.edgelab;

/** Told of each token as it is chosen. */
public interface TokenCallback {
  /** Returns whether to go on. The token {@code id} is part of the answer either way. */
  boolean onToken(long id);
}
