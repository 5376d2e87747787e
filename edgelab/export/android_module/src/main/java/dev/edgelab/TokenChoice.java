package dev.edgelab;

import java.util.Random;

/** How a token is chosen from the logits of the last position. */
public interface TokenChoice {
  int choose(float[] logits);

  /** Draws from softmax(logits / temperature); the same {@code seed} draws the same. */
  static TokenChoice sampling(float temperature, long seed) {
    if (!(temperature > 0)) {
      throw new IllegalArgumentException("temperature=" + temperature + " is not above 0; greedy choice needs no TokenChoice");
    }
    Random random = new Random(seed);
    return logits -> {
      double highest = Double.NEGATIVE_INFINITY;
      for (float logit : logits) highest = Math.max(highest, logit);
      double[] weights = new double[logits.length];
      double total = 0;
      for (int i = 0; i < logits.length; i++) total += weights[i] = Math.exp((logits[i] - highest) / temperature);
      double left = random.nextDouble() * total;
      for (int i = 0; i < weights.length; i++) if ((left -= weights[i]) < 0) return i;
      return weights.length - 1;
    };
  }
}
