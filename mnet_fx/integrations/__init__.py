"""One line in other libraries' trainers. Each module here needs its library and is imported by name; nothing else imports them."""
