"""Reports: a summary or a ranking in, text out; nothing here prints, measures or stores."""
