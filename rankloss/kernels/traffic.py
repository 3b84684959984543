class Traffic: pass
def traffic(): pass
