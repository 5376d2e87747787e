package dev.edgelab;

import java.io.File;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.util.HashSet;
import java.util.Map;
import java.util.Set;

/** Text in, text out: the model, its tokenizer and its chat template from one folder, as edgelab's export wrote it. */
public final class EdgeChat implements AutoCloseable {
  /** Of edgelab.json; another number is another layout of the folder. */
  public static final int FORMAT = 1;

  private final EdgeModel model;
  private final EdgeTokenizer tokenizer;
  private final Map<String, Object> chat; // before, after, trim; null: the tokenizer has no template
  private final Set<Long> stop = new HashSet<>();
  private final int batchSize;

  private EdgeChat(File folder, int threads) throws IOException {
    File about = new File(folder, "edgelab.json");
    if (!about.isFile()) throw new FileNotFoundException("there is no edgelab.json in " + folder);
    Map<String, Object> all = Json.map(Json.read(EdgeTokenizer.readText(about)));
    if (Json.integer(all.get("format")) != FORMAT) {
      throw new EdgeException(EdgeException.WRONG_MODEL, "edgelab.json is of format " + all.get("format") + "; this code reads " + FORMAT);
    }
    Map<String, Object> facts = Json.map(all.get("model"));
    chat = all.get("chat") == null ? null : Json.map(all.get("chat"));
    for (long id : Json.integers(facts.get("stop"))) stop.add(id);
    batchSize = (int) Json.integer(all.get("batch_size"));
    tokenizer = EdgeTokenizer.load(new File(folder, Json.string(Json.map(all.get("tokenizer")).get("file"))));
    String path = new File(folder, Json.string(facts.get("file"))).getPath();
    int count = threads >= 0 ? threads : (int) Json.integer(all.get("threads"));
    model = EdgeModel.load(path, count, (int) Json.integer(facts.get("context")));
  }

  /** The model in {@code folder}, with the threads that its edgelab.json asks for. */
  public static EdgeChat open(File folder) throws IOException {
    return new EdgeChat(folder, -1);
  }

  /** The model in {@code folder} with {@code threads} threads; 0: the runtime's choice. */
  public static EdgeChat open(File folder, int threads) throws IOException {
    return new EdgeChat(folder, threads);
  }

  /** The model's answer to {@code message}, greedy, of up to {@code maxNew} tokens. {@code callback} may be null. */
  public String answer(String message, int maxNew, TextCallback callback) {
    return write(tokenizer.encode(prompt(message), false), maxNew, null, callback);
  }

  /** How the model goes on after {@code text}, greedy. */
  public String complete(String text, int maxNew, TextCallback callback) {
    return write(tokenizer.encode(text, true), maxNew, null, callback);
  }

  /** What {@code text} (or a message, if {@code asMessage}) is followed by, each token chosen by {@code choice}. */
  public String write(String text, boolean asMessage, int maxNew, TokenChoice choice, TextCallback callback) {
    return write(asMessage ? tokenizer.encode(prompt(text), false) : tokenizer.encode(text, true), maxNew, choice, callback);
  }

  private String write(long[] prompt, int maxNew, TokenChoice choice, TextCallback callback) {
    EdgeTokenizer.Decoder decoder = tokenizer.decoder(false);
    StringBuilder answer = new StringBuilder();
    model.generate(prompt, maxNew, choice, id -> {
      if (stop.contains(id)) return false;
      String piece = decoder.push(id);
      answer.append(piece);
      return piece.isEmpty() || callback == null || callback.onText(piece);
    });
    String rest = decoder.end();
    if (!rest.isEmpty() && callback != null) callback.onText(rest);
    return answer.append(rest).toString();
  }

  /** The text that the chat template makes of one message. */
  public String prompt(String message) {
    if (chat == null) throw new EdgeException(EdgeException.WRONG_MODEL, "this model has no chat template; use complete");
    String inner = chat.get("trim") == Boolean.TRUE ? stripped(message) : message;
    return Json.string(chat.get("before")) + inner + Json.string(chat.get("after"));
  }

  private static String stripped(String text) {
    int from = 0, to = text.length();
    while (from < to && isSpace(text.charAt(from))) from++;
    while (to > from && isSpace(text.charAt(to - 1))) to--;
    return text.substring(from, to);
  }

  private static boolean isSpace(char c) {
    return Character.isWhitespace(c) || Character.isSpaceChar(c) || c == '\u0085';
  }

  public EdgeModel model() {
    return model;
  }

  public EdgeTokenizer tokenizer() {
    return tokenizer;
  }

  /** How many prompts the app was exported to compute together with {@link EdgeModel#predictBatch}; advice, not a limit. */
  public int batchSize() {
    return batchSize;
  }

  /** Frees the model's memory, after ending an answer that is under way; a second time does nothing. */
  @Override
  public void close() {
    model.release();
  }
}
