package dev.edgelab;

/** What the model, the runtime or an argument refuses. A file that is not there is a {@link java.io.FileNotFoundException} instead. */
public class EdgeException extends RuntimeException {
  private static final long serialVersionUID = 1L;

  /** ONNX Runtime's library is not in the app, or is a version that this code does not know. */
  public static final int NO_RUNTIME = -1;
  /** The file is no model of the kind asked for. */
  public static final int WRONG_MODEL = -2;
  public static final int NO_MEMORY = -3;
  public static final int BAD_ARGUMENT = -4;
  /** The model was released before. */
  public static final int RELEASED = -5;

  private final int code;

  public EdgeException(int code, String message) {
    super(message);
    this.code = code;
  }

  /** One of the constants above, or a positive code of ONNX Runtime's. */
  public int code() {
    return code;
  }
}
