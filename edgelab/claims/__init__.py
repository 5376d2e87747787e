"""The claims of five articles, one function each: measured or modelled with this package's public calls. `index` lists them."""
