package dev.edgelab;

import java.io.BufferedReader;
import java.io.File;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;

/**
 * The classes of this module, asked over standard input: one JSON object a line in, one out. edgelab's verification drives it on a JVM.
 * A command that throws answers {"error": class, "message": text}.
 */
public final class Probe {
  private Probe() {}

  private static EdgeModel model;
  private static EdgeTokenizer tokenizer;
  private static EdgeChat chat;

  public static void main(String[] args) throws IOException {
    BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    PrintStream out = new PrintStream(System.out, true, "UTF-8");
    for (String line; (line = in.readLine()) != null; ) {
      String answer;
      try {
        answer = answer(Json.map(Json.read(line)));
      } catch (Exception e) {
        answer = "\"error\":" + Json.quote(e.getClass().getName()) + ",\"message\":" + Json.quote(String.valueOf(e.getMessage()));
        if (e instanceof EdgeException) answer += ",\"code\":" + ((EdgeException) e).code();
      }
      out.println("{" + answer + "}");
    }
  }

  private static String answer(Map<String, Object> ask) throws Exception {
    switch (Json.string(ask.get("do"))) {
      case "version":
        return "\"version\":" + Json.quote(EdgeModel.runtimeVersion()) + ",\"java\":" + Json.quote(System.getProperty("java.version"));
      case "load":
        model = EdgeModel.load((String) ask.get("path"), (int) Json.integer(ask.get("threads")), (int) Json.integer(ask.get("context")));
        return "\"vocabulary\":" + model.vocabulary();
      case "release":
        model.release();
        return "\"released\":true";
      case "predict":
        return "\"logits\":" + save(ask, model.predict(Json.integers(ask.get("ids"))));
      case "logits":
        return "\"logits\":" + save(ask, logits(Json.integers(ask.get("ids")), Json.integers(ask.get("cuts"))));
      case "batch":
        return "\"logits\":" + save(ask, batch(Json.list(ask.get("prompts"))));
      case "generate":
        return generate(Json.integers(ask.get("prompt")), (int) Json.integer(ask.get("max")), ask);
      case "nested":
        model.generate(Json.integers(ask.get("ids")), 3, id -> model.predict(new long[] {id}).length > 0);
        return "\"done\":true";
      case "released":
        return "\"ids\":" + Arrays.toString(model.generate(Json.integers(ask.get("ids")), 50, id -> {
          model.release(); // from the callback itself: generate ends after this token
          return true;
        }));
      case "threads":
        return threads(Json.integers(ask.get("ids")), (int) Json.integer(ask.get("times")));
      case "stop":
        return stop(Json.integers(ask.get("ids")));
      case "tokenizer":
        tokenizer = EdgeTokenizer.load(new File(Json.string(ask.get("path"))));
        return "\"read\":true";
      case "encode":
        return "\"rows\":[" + encode(Json.list(ask.get("texts"))) + "]";
      case "decode":
        return "\"text\":" + Json.quote(tokenizer.decode(Json.integers(ask.get("ids")), false));
      case "defined":
        return "\"defined\":" + Json.string(ask.get("text")).codePoints().allMatch(Character::isDefined);
      case "open":
        if (chat != null) chat.close();
        chat = EdgeChat.open(new File(Json.string(ask.get("folder"))));
        return "\"batch_size\":" + chat.batchSize();
      case "prompt":
        return "\"ids\":" + Arrays.toString(chat.tokenizer().encode(chat.prompt(Json.string(ask.get("text"))), false));
      case "answer":
        return said(ask);
      case "install":
        return install(Json.string(ask.get("from")), Json.string(ask.get("to")));
      case "net":
        return net(ask);
      case "loop":
        return loop(ask);
      case "bench":
        return bench(Json.integers(ask.get("prompt")), (int) Json.integer(ask.get("max")));
      default:
        throw new IllegalArgumentException("no command " + ask.get("do"));
    }
  }

  /** Writes float32, little endian, to the file that is asked for; returns their number. */
  private static int save(Map<String, Object> ask, float[] values) throws IOException {
    ByteBuffer bytes = ByteBuffer.allocate(4 * values.length).order(ByteOrder.LITTLE_ENDIAN);
    bytes.asFloatBuffer().put(values);
    try (FileOutputStream out = new FileOutputStream(Json.string(ask.get("to")))) {
      out.write(bytes.array());
    }
    return values.length;
  }

  private static float[] joined(List<float[]> parts) {
    int count = 0, at = 0;
    for (float[] part : parts) count += part.length;
    float[] all = new float[count];
    for (float[] part : parts) {
      System.arraycopy(part, 0, all, at, part.length);
      at += part.length;
    }
    return all;
  }

  /** Logits of all positions, read in pieces that end at {@code cuts}; without cuts at once. */
  private static float[] logits(long[] ids, long[] cuts) {
    if (cuts.length == 0) return model.predictAll(ids);
    List<float[]> parts = new ArrayList<>();
    int from = 0;
    model.forget();
    for (long to : cuts) {
      parts.add(model.advance(Arrays.copyOfRange(ids, from, (int) to)));
      from = (int) to;
    }
    return joined(parts);
  }

  private static float[] batch(List<Object> prompts) {
    long[][] rows = new long[prompts.size()][];
    for (int i = 0; i < rows.length; i++) rows[i] = Json.integers(prompts.get(i));
    return joined(Arrays.asList(model.predictBatch(rows)));
  }

  private static String generate(long[] prompt, int max, Map<String, Object> ask) {
    long until = ask.get("until") == null ? Long.MAX_VALUE : Json.integer(ask.get("until"));
    List<Long> told = new ArrayList<>();
    TokenCallback callback = id -> {
      told.add(id);
      return told.size() < until;
    };
    TokenChoice choice = ask.get("temperature") == null ? null : TokenChoice.sampling(((Number) ask.get("temperature")).floatValue(), 1);
    long[] ids = model.generate(prompt, max, choice, callback);
    return "\"ids\":" + Arrays.toString(ids) + ",\"told\":" + told;
  }

  /** Two threads predict at once, over and over; how often a result differed from the first. */
  private static String threads(long[] ids, int times) throws InterruptedException {
    float[] expected = model.predict(ids);
    int[] wrong = new int[2];
    Thread[] both = new Thread[2];
    for (int t = 0; t < 2; t++) {
      int me = t;
      both[t] = new Thread(() -> {
        for (int i = 0; i < times; i++) {
          if (me == 1) model.generate(ids, 2, null);
          if (!Arrays.equals(expected, model.predict(ids))) wrong[me]++;
        }
      });
      both[t].start();
    }
    for (Thread t : both) t.join();
    return "\"wrong\":" + (wrong[0] + wrong[1]);
  }

  /** A generate without an end, stopped from another thread. */
  private static String stop(long[] ids) throws InterruptedException {
    long[][] written = new long[1][];
    Object began = new Object();
    Thread writer = new Thread(() -> written[0] = model.generate(ids, Integer.MAX_VALUE, id -> {
      synchronized (began) {
        began.notifyAll();
      }
      return true;
    }));
    synchronized (began) {
      writer.start();
      began.wait(10_000);
    }
    model.stop();
    writer.join(10_000);
    return "\"ended\":" + !writer.isAlive() + ",\"count\":" + (written[0] == null ? -1 : written[0].length);
  }

  private static String encode(List<Object> texts) {
    StringBuilder rows = new StringBuilder();
    for (Object text : texts) {
      long[] ids = tokenizer.encode(Json.string(text), true);
      EdgeTokenizer.Decoder decoder = tokenizer.decoder(false);
      StringBuilder streamed = new StringBuilder();
      for (long id : ids) streamed.append(decoder.push(id));
      streamed.append(decoder.end());
      rows.append(rows.length() > 0 ? "," : "").append("[").append(Arrays.toString(ids)).append(",");
      rows.append(Json.quote(tokenizer.decode(ids, true))).append(",").append(Json.quote(streamed.toString())).append("]");
    }
    return rows.toString();
  }

  private static String said(Map<String, Object> ask) {
    StringBuilder pieces = new StringBuilder();
    TextCallback callback = piece -> pieces.append(piece) != null;
    String text = Json.string(ask.get("text"));
    int max = (int) Json.integer(ask.get("max"));
    String said = ask.get("chat") == Boolean.FALSE ? chat.complete(text, max, callback) : chat.answer(text, max, callback);
    return "\"text\":" + Json.quote(said) + ",\"streamed\":" + Json.quote(pieces.toString());
  }

  private static String install(String from, String to) throws IOException {
    return "\"folder\":" + Json.quote(EdgeFiles.install(name -> new FileInputStream(new File(from, name)), new File(to)).getPath());
  }

  private static String net(Map<String, Object> ask) throws IOException {
    byte[] raw = new byte[(int) new File(Json.string(ask.get("from"))).length()];
    try (FileInputStream in = new FileInputStream(Json.string(ask.get("from")))) {
      for (int at = 0, n; at < raw.length && (n = in.read(raw, at, raw.length - at)) > 0; ) at += n;
    }
    float[] input = new float[raw.length / 4];
    ByteBuffer.wrap(raw).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(input);
    try (EdgeNet net = EdgeNet.load(Json.string(ask.get("path")), 1)) {
      String stated = Arrays.toString(net.inputShape());
      return "\"shape\":" + stated + ",\"output\":" + save(ask, net.predict(input, Json.integers(ask.get("shape"))));
    }
  }

  /** Memory of the process in kB after each of {@code rounds} rounds of load, predict, generate and (or else forget) release. */
  private static String loop(Map<String, Object> ask) throws Exception {
    int rounds = (int) Json.integer(ask.get("rounds"));
    long[] ids = Json.integers(ask.get("ids")), kb = new long[rounds];
    for (int i = 0; i < rounds; i++) {
      for (int j = 0; j < Json.integer(ask.get("each")); j++) {
        EdgeModel m = EdgeModel.load(Json.string(ask.get("path")), 1);
        for (int k = 0; k < 20; k++) m.predict(ids);
        m.generate(ids, 8, null);
        try {
          m.predict(new long[] {-1});
        } catch (EdgeException e) {
          // the ways that fail are to leak nothing either
        }
        if (ask.get("release") != Boolean.FALSE) m.release();
      }
      System.gc();
      Thread.sleep(ask.get("release") != Boolean.FALSE ? 0 : 200); // the reaper's time
      kb[i] = residentKb();
    }
    return "\"kb\":" + Arrays.toString(kb);
  }

  private static long residentKb() throws IOException {
    for (String line : EdgeTokenizer.readText(new File("/proc/self/status")).split("\n")) {
      if (line.startsWith("VmRSS:")) return Long.parseLong(line.replaceAll("\\D", ""));
    }
    return -1;
  }

  /** Nanoseconds of the prompt with the first token and of each later one; and of a call through JNI that computes nothing. */
  private static String bench(long[] prompt, int max) {
    long[] at = new long[max + 1];
    int[] count = {0};
    at[0] = System.nanoTime();
    model.generate(prompt, max, id -> {
      at[++count[0]] = System.nanoTime();
      return true;
    });
    long[] took = new long[count[0]];
    for (int i = 0; i < took.length; i++) took[i] = at[i + 1] - at[i];
    long began = System.nanoTime();
    int calls = 100_000;
    for (int i = 0; i < calls; i++) model.forget();
    return "\"ns\":" + Arrays.toString(took) + ",\"call_ns\":" + (System.nanoTime() - began) / calls;
  }
}
