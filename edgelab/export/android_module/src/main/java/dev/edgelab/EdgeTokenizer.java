package dev.edgelab;

import java.io.ByteArrayOutputStream;
import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.CharBuffer;
import java.nio.charset.CharsetDecoder;
import java.nio.charset.CodingErrorAction;
import java.nio.charset.StandardCharsets;
import java.text.Normalizer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.PriorityQueue;
import java.util.Set;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * Byte-level BPE: text to token ids and back, as the {@code tokenizers} library computes them from the same tokenizer.json. What that
 * file may ask for beyond (other models, normalizers, cuts) is refused when it is read. Classes of characters are those of the
 * platform's Unicode version: one assigned later is no letter here. Any thread may call.
 */
public final class EdgeTokenizer {
  private static final String GPT2 =
      "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"; // what ByteLevel cuts by, if told to
  private static final int KEPT_WORDS = 20_000;
  private static final char[] CHAR_OF = new char[256]; // the byte alphabet: printable Latin-1 stands for itself, the rest from U+0100
  private static final Map<Character, Integer> BYTE_OF = new HashMap<>();

  static {
    char next = 256;
    for (int b = 0; b < 256; b++) {
      boolean printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      CHAR_OF[b] = printable ? (char) b : next++;
      BYTE_OF.put(CHAR_OF[b], b);
    }
  }

  private final Map<String, Integer> ids = new HashMap<>();
  private final Map<Integer, String> tokens = new HashMap<>();
  private final Map<Long, int[]> merges = new HashMap<>(); // left id << 32 | right id -> {rank, id of both together}
  private final List<Pattern> steps = new ArrayList<>();
  private final Map<String, Integer> added = new HashMap<>();
  private final Set<Integer> special = new HashSet<>();
  private final Pattern addedPattern;
  private final boolean nfc;
  private final boolean wholeFirst;
  private final long[] begin;
  private final Map<String, int[]> words = new HashMap<>();

  /** The tokenizer in a tokenizer.json. */
  public static EdgeTokenizer load(File file) throws IOException {
    return new EdgeTokenizer(Json.map(Json.read(readText(file))));
  }

  static String readText(File file) throws IOException {
    try (InputStream in = new FileInputStream(file)) {
      ByteArrayOutputStream out = new ByteArrayOutputStream();
      byte[] some = new byte[1 << 16];
      for (int n; (n = in.read(some)) > 0; ) out.write(some, 0, n);
      return out.toString("UTF-8");
    }
  }

  private EdgeTokenizer(Map<String, Object> spec) {
    Map<String, Object> model = Json.map(spec.get("model"));
    require("BPE".equals(model.get("type")), "is " + model.get("type") + ", no BPE");
    for (String odd : new String[] {"unk_token", "dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
      require(model.get(odd) == null || "".equals(model.get(odd)), "has " + odd);
    }
    require(model.get("byte_fallback") != Boolean.TRUE, "has byte_fallback");
    Object normalizer = spec.get("normalizer");
    nfc = normalizer != null;
    require(!nfc || "NFC".equals(Json.map(normalizer).get("type")), "normalizes by " + normalizer);
    wholeFirst = model.get("ignore_merges") == Boolean.TRUE;
    for (Map.Entry<String, Object> e : Json.map(model.get("vocab")).entrySet()) put(e.getKey(), (int) Json.integer(e.getValue()));
    for (char c : CHAR_OF) require(ids.containsKey(String.valueOf(c)), "has no token for a byte");
    readMerges(Json.list(model.get("merges")));
    readCuts(spec.get("pre_tokenizer"));
    addedPattern = readAdded(spec.get("added_tokens") == null ? Collections.emptyList() : Json.list(spec.get("added_tokens")));
    begin = spec.get("post_processor") == null ? new long[0] : readBegin(Json.map(spec.get("post_processor")));
  }

  private static void require(boolean good, String what) {
    if (!good) throw new EdgeException(EdgeException.WRONG_MODEL, "the tokenizer " + what + "; byte-level BPE is what is read here");
  }

  private void put(String token, int id) {
    ids.put(token, id);
    tokens.put(id, token);
  }

  private void readMerges(List<Object> list) {
    int rank = 0;
    for (Object merge : list) {
      String left, right;
      if (merge instanceof String) {
        int gap = ((String) merge).indexOf(' ', 1);
        require(gap > 0, "has the merge " + merge);
        left = ((String) merge).substring(0, gap);
        right = ((String) merge).substring(gap + 1);
      } else {
        left = Json.string(Json.list(merge).get(0));
        right = Json.string(Json.list(merge).get(1));
      }
      Integer l = ids.get(left), r = ids.get(right), both = ids.get(left + right);
      require(l != null && r != null && both != null, "merges " + left + " and " + right + ", which are no tokens");
      merges.put((long) l << 32 | r, new int[] {rank++, both});
    }
  }

  private void readCuts(Object pre) {
    require(pre != null, "is not byte-level");
    List<Object> cuts = Json.map(pre).containsKey("pretokenizers") ? Json.list(Json.map(pre).get("pretokenizers")) : Arrays.asList(pre);
    boolean byteLevel = false;
    for (Object cut : cuts) {
      Map<String, Object> c = Json.map(cut);
      if ("Digits".equals(c.get("type")) && c.get("individual_digits") == Boolean.TRUE) {
        steps.add(Pattern.compile("\\p{N}"));
      } else if ("Split".equals(c.get("type")) && "Isolated".equals(c.get("behavior")) && c.get("invert") == Boolean.FALSE) {
        steps.add(pattern(Json.string(Json.map(c.get("pattern")).get("Regex"))));
      } else if ("ByteLevel".equals(c.get("type")) && c.get("add_prefix_space") == Boolean.FALSE) {
        if (c.get("use_regex") == Boolean.TRUE) steps.add(pattern(GPT2));
        byteLevel = true;
      } else {
        require(false, "cuts text by " + cut);
      }
    }
    require(byteLevel, "is not byte-level");
  }

  private Pattern readAdded(List<Object> list) {
    for (Object entry : list) {
      Map<String, Object> t = Json.map(entry);
      String content = Json.string(t.get("content"));
      int id = (int) Json.integer(t.get("id"));
      boolean own = t.get("single_word") == Boolean.TRUE || t.get("lstrip") == Boolean.TRUE || t.get("rstrip") == Boolean.TRUE;
      require(!own && !(nfc && t.get("normalized") == Boolean.TRUE), "finds " + content + " in a way of its own");
      added.put(content, id);
      tokens.put(id, content);
      if (t.get("special") == Boolean.TRUE) special.add(id);
    }
    List<String> longestFirst = new ArrayList<>(added.keySet()); // where two begin together the longer one wins
    Collections.sort(longestFirst, (a, b) -> b.length() - a.length());
    StringBuilder any = new StringBuilder();
    for (String token : longestFirst) any.append(any.length() > 0 ? "|" : "").append(Pattern.quote(token));
    return added.isEmpty() ? null : Pattern.compile(any.toString());
  }

  /** The ids that the post-processor puts in front of a text. */
  private static long[] readBegin(Map<String, Object> processor) {
    if ("Sequence".equals(processor.get("type"))) {
      List<Object> all = Json.list(processor.get("processors"));
      long[] found = new long[0];
      for (Object one : all) {
        long[] more = readBegin(Json.map(one));
        if (more.length > 0) found = more;
      }
      return found;
    }
    if ("ByteLevel".equals(processor.get("type"))) return new long[0];
    require("TemplateProcessing".equals(processor.get("type")), "has a post-processor " + processor.get("type"));
    List<Long> found = new ArrayList<>();
    boolean text = false;
    for (Object part : Json.list(processor.get("single"))) {
      if (Json.map(part).containsKey("Sequence")) {
        text = true;
        continue;
      }
      require(!text, "puts tokens behind a text");
      String name = Json.string(Json.map(Json.map(part).get("SpecialToken")).get("id"));
      for (long id : Json.integers(Json.map(Json.map(processor.get("special_tokens")).get(name)).get("ids"))) found.add(id);
    }
    long[] result = new long[found.size()];
    for (int i = 0; i < result.length; i++) result[i] = found.get(i);
    return result;
  }

  /**
   * A pattern of the library (Oniguruma) as java.util.regex reads it. White space is spelt out, since neither the JVM's nor Android's
   * \s is Unicode's without a flag that the other does not know.
   */
  static Pattern pattern(String given) {
    String spaces = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
    StringBuilder out = new StringBuilder();
    boolean inside = false; // of a class [...]
    for (int i = 0; i < given.length(); i++) {
      char c = given.charAt(i);
      if (c == '\\') {
        char what = i + 1 < given.length() ? given.charAt(++i) : '\\';
        if (what == 's') out.append(inside ? spaces : "[" + spaces + "]");
        else if (what == 'S' && !inside) out.append("[^" + spaces + "]");
        else if (what == 'd') out.append("\\p{Nd}");
        else if ("pPrnt".indexOf(what) >= 0 || !Character.isLetterOrDigit(what)) out.append('\\').append(what);
        else require(false, "cuts text by " + given + ", where \\" + what + " may mean something else here");
      } else if (c == '.' && !inside) {
        out.append("[^\\n]");
      } else if (inside && (c == '[' || c == '&')) {
        out.append('\\').append(c);
      } else {
        if (c == '[') inside = true;
        if (c == ']') inside = false;
        out.append(c);
      }
    }
    return Pattern.compile(out.toString(), Pattern.UNICODE_CASE);
  }

  /** Ids of {@code text}, with those in front that the tokenizer puts there if {@code withBegin}; a chat template brings its own. */
  public synchronized long[] encode(String text, boolean withBegin) {
    Ids out = new Ids();
    if (withBegin) for (long id : begin) out.add((int) id);
    int at = 0;
    for (Matcher m = addedPattern == null ? null : addedPattern.matcher(text); m != null && m.find(); at = m.end()) {
      plain(text.substring(at, m.start()), out);
      out.add(added.get(m.group()));
    }
    plain(text.substring(at), out);
    return out.all();
  }

  private void plain(String text, Ids out) {
    if (text.isEmpty()) return;
    List<String> parts = Arrays.asList(nfc ? Normalizer.normalize(text, Normalizer.Form.NFC) : text);
    for (Pattern step : steps) {
      List<String> finer = new ArrayList<>();
      for (String part : parts) cut(part, step, finer);
      parts = finer;
    }
    for (String part : parts) for (int id : word(part)) out.add(id);
  }

  /** Adds the matches in {@code text} and what lies between them to {@code out}. */
  private static void cut(String text, Pattern pattern, List<String> out) {
    int at = 0;
    Matcher m = pattern.matcher(text);
    while (m.find()) {
      if (m.end() == m.start()) continue;
      if (m.start() > at) out.add(text.substring(at, m.start()));
      out.add(m.group());
      at = m.end();
    }
    if (at < text.length()) out.add(text.substring(at));
  }

  private int[] word(String text) {
    int[] known = words.get(text);
    if (known != null) return known;
    byte[] bytes = text.getBytes(StandardCharsets.UTF_8);
    char[] letters = new char[bytes.length];
    for (int i = 0; i < bytes.length; i++) letters[i] = CHAR_OF[bytes[i] & 255];
    Integer whole = wholeFirst ? ids.get(new String(letters)) : null;
    int[] result = whole != null ? new int[] {whole} : merge(letters);
    if (words.size() >= KEPT_WORDS) words.clear(); // an app may run for days
    words.put(text, result);
    return result;
  }

  /** The bytes of one piece, the best ranked neighbours joined (the leftmost of equals) until no pair is known. */
  private int[] merge(char[] letters) {
    int n = letters.length;
    int[] id = new int[n], next = new int[n], before = new int[n];
    PriorityQueue<Long> waiting = new PriorityQueue<>(); // rank << 32 | place of the left one; some are out of date when they come
    for (int i = 0; i < n; i++) {
      id[i] = ids.get(String.valueOf(letters[i]));
      next[i] = i + 1;
      before[i] = i - 1;
    }
    for (int i = 0; i + 1 < n; i++) offer(waiting, id, i, i + 1);
    while (!waiting.isEmpty()) {
      long best = waiting.poll();
      int left = (int) best;
      if (id[left] < 0 || next[left] >= n) continue;
      int right = next[left];
      int[] pair = merges.get((long) id[left] << 32 | id[right]);
      if (pair == null || pair[0] != best >> 32) continue;
      id[left] = pair[1];
      id[right] = -1;
      next[left] = next[right];
      if (next[left] < n) {
        before[next[left]] = left;
        offer(waiting, id, left, next[left]);
      }
      if (before[left] >= 0) offer(waiting, id, before[left], left);
    }
    int count = 0;
    for (int i = 0; i < n; i = next[i]) id[count++] = id[i];
    return Arrays.copyOf(id, count);
  }

  private void offer(PriorityQueue<Long> waiting, int[] id, int left, int right) {
    int[] pair = merges.get((long) id[left] << 32 | id[right]);
    if (pair != null) waiting.add((long) pair[0] << 32 | left);
  }

  /** The text of {@code ids}; special tokens are left out unless {@code withSpecial}. */
  public String decode(long[] ids, boolean withSpecial) {
    Decoder decoder = decoder(withSpecial);
    StringBuilder out = new StringBuilder();
    for (long id : ids) out.append(decoder.push(id));
    return out.append(decoder.end()).toString();
  }

  public boolean isSpecial(long id) {
    return special.contains((int) id);
  }

  /** A decoder that takes one id at a time. */
  public Decoder decoder(boolean withSpecial) {
    return new Decoder(withSpecial);
  }

  /** Text from ids, one by one. One thread at a time. */
  public final class Decoder {
    private final boolean withSpecial;
    private final CharsetDecoder utf8 =
        StandardCharsets.UTF_8.newDecoder().onMalformedInput(CodingErrorAction.REPLACE).onUnmappableCharacter(CodingErrorAction.REPLACE);
    private byte[] pending = new byte[0]; // a character's first bytes

    private Decoder(boolean withSpecial) {
      this.withSpecial = withSpecial;
    }

    /** The text that is complete with {@code id}. */
    public String push(long id) {
      String token = tokens.get((int) id);
      return token == null || (!withSpecial && isSpecial(id)) ? "" : decode(bytes(token), false);
    }

    /** What is left: the replacement character for half a character. */
    public String end() {
      return decode(new byte[0], true);
    }

    private String decode(byte[] more, boolean last) {
      byte[] all = Arrays.copyOf(pending, pending.length + more.length);
      System.arraycopy(more, 0, all, pending.length, more.length);
      ByteBuffer in = ByteBuffer.wrap(all);
      CharBuffer out = CharBuffer.allocate(all.length + 4);
      utf8.reset();
      utf8.decode(in, out, last);
      if (last) utf8.flush(out);
      pending = Arrays.copyOfRange(all, in.position(), all.length);
      out.flip();
      return out.toString();
    }

    private byte[] bytes(String token) {
      byte[] result = new byte[token.length()];
      for (int i = 0; i < result.length; i++) {
        Integer b = BYTE_OF.get(token.charAt(i));
        if (b == null) return token.getBytes(StandardCharsets.UTF_8); // an added token outside the alphabet is its own text
        result[i] = (byte) (int) b;
      }
      return result;
    }
  }

  private static final class Ids {
    private long[] ids = new long[64];
    private int count;

    void add(int id) {
      if (count == ids.length) ids = Arrays.copyOf(ids, 2 * count);
      ids[count++] = id;
    }

    long[] all() {
      return Arrays.copyOf(ids, count);
    }
  }
}
