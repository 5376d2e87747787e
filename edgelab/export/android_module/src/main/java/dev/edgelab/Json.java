package dev.edgelab;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * A JSON reader of its own, because org.json is Android's and no JVM's. Objects are {@code Map<String, Object>} in order, arrays
 * {@code List<Object>}, numbers Long or Double, and null is null.
 */
final class Json {
  private static final int DEEPEST = 64;

  private final String text;
  private int at;

  private Json(String text) {
    this.text = text;
  }

  static Object read(String text) {
    Json json = new Json(text);
    Object value = json.value(0);
    json.blank();
    if (json.at < text.length()) throw json.wrong("something behind the end");
    return value;
  }

  @SuppressWarnings("unchecked")
  static Map<String, Object> map(Object value) {
    if (value instanceof Map) return (Map<String, Object>) value;
    throw new EdgeException(EdgeException.WRONG_MODEL, "JSON: an object is expected, not " + value);
  }

  @SuppressWarnings("unchecked")
  static List<Object> list(Object value) {
    if (value instanceof List) return (List<Object>) value;
    throw new EdgeException(EdgeException.WRONG_MODEL, "JSON: an array is expected, not " + value);
  }

  static long integer(Object value) {
    if (value instanceof Long) return (Long) value;
    throw new EdgeException(EdgeException.WRONG_MODEL, "JSON: a whole number is expected, not " + value);
  }

  static String string(Object value) {
    if (value instanceof String) return (String) value;
    throw new EdgeException(EdgeException.WRONG_MODEL, "JSON: a text is expected, not " + value);
  }

  static long[] integers(Object value) {
    List<Object> list = list(value);
    long[] result = new long[list.size()];
    for (int i = 0; i < result.length; i++) result[i] = integer(list.get(i));
    return result;
  }

  /** {@code text} as a JSON string. */
  static String quote(String text) {
    StringBuilder out = new StringBuilder("\"");
    for (int i = 0; i < text.length(); i++) {
      char c = text.charAt(i);
      if (c == '"' || c == '\\') out.append('\\').append(c);
      else if (c < ' ' || c > '~') out.append(String.format("\\u%04x", (int) c));
      else out.append(c);
    }
    return out.append('"').toString();
  }

  private EdgeException wrong(String what) {
    return new EdgeException(EdgeException.WRONG_MODEL, "JSON: " + what + " at character " + at);
  }

  private void blank() {
    while (at < text.length() && " \t\r\n".indexOf(text.charAt(at)) >= 0) at++;
  }

  private char next() {
    if (at >= text.length()) throw wrong("it ends too early");
    return text.charAt(at++);
  }

  private boolean comes(char c) {
    blank();
    if (at >= text.length() || text.charAt(at) != c) return false;
    at++;
    return true;
  }

  private Object value(int depth) {
    if (depth > DEEPEST) throw wrong("more than " + DEEPEST + " levels");
    blank();
    char c = next();
    switch (c) {
      case '{':
        return object(depth);
      case '[':
        return array(depth);
      case '"':
        return text();
      default:
        at--;
        return word();
    }
  }

  private Map<String, Object> object(int depth) {
    Map<String, Object> result = new LinkedHashMap<>();
    if (comes('}')) return result;
    do {
      if (!comes('"')) throw wrong("no name");
      String name = text();
      if (!comes(':')) throw wrong("no colon");
      result.put(name, value(depth + 1));
    } while (comes(','));
    if (!comes('}')) throw wrong("no }");
    return result;
  }

  private List<Object> array(int depth) {
    List<Object> result = new ArrayList<>();
    if (comes(']')) return result;
    do {
      result.add(value(depth + 1));
    } while (comes(','));
    if (!comes(']')) throw wrong("no ]");
    return result;
  }

  private String text() {
    StringBuilder out = new StringBuilder();
    while (true) {
      char c = next();
      if (c == '"') return out.toString();
      if (c != '\\') {
        out.append(c);
        continue;
      }
      c = next();
      int known = "\"\\/bfnrt".indexOf(c);
      if (known >= 0) {
        out.append("\"\\/\b\f\n\r\t".charAt(known));
      } else if (c == 'u' && at + 4 <= text.length()) {
        out.append((char) Integer.parseInt(text.substring(at, at + 4), 16));
        at += 4;
      } else {
        throw wrong("an unknown escape");
      }
    }
  }

  private Object word() {
    int from = at;
    while (at < text.length() && ",]} \t\r\n".indexOf(text.charAt(at)) < 0) at++;
    String word = text.substring(from, at);
    switch (word) {
      case "null":
        return null;
      case "true":
        return Boolean.TRUE;
      case "false":
        return Boolean.FALSE;
      default:
        try {
          return word.matches("-?\\d{1,18}") ? (Object) Long.valueOf(word) : (Object) Double.valueOf(word);
        } catch (NumberFormatException e) {
          at = from;
          throw wrong("neither a number nor a word");
        }
    }
  }
}
