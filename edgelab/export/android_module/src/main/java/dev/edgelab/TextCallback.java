package dev.edgelab;

/** Told of each piece of text as it is complete (a character can take several tokens). */
public interface TextCallback {
  /** Returns whether to go on. */
  boolean onText(String piece);
}
